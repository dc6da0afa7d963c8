"""Keep products of two activations in float where that costs more than it gives.

A product gives time, in proportion to its multiplications, and costs the δ of its operands. It pays if these are
a share of the δ of all activations that is at most _WORTH times the product's share of all multiplications, or at most
_HARMLESS; at 4 bits where the budget of activations is narrow, at 8 where it is not.
"""

import math
from collections.abc import Mapping

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.analysis.patterns import pins
from rdoq_onnx.config import Config
from rdoq_onnx.curves.measurement import FloatFallback
from rdoq_onnx.observation.equalization import typical_widths
from rdoq_onnx.observation.observe import Observation
from rdoq_onnx.observation.shapes import shapes_of
from rdoq_onnx.probing.distortions import Distortions
from rdoq_onnx.probing.probe import Prober

_HARMLESS = 3e-3  # share of δ
_WORTH = 0.5  # share of δ over that of multiplications


def unpaid(
    prober: Prober, measured: Distortions, config: Config, observation: Observation, fallback: FloatFallback
) -> FloatFallback:
    """Return the operands of products that do not pay, beside those of `fallback`."""
    network = prober.network
    if not network.products:
        return FloatFallback({}, {})
    bits, _ = typical_widths(config)
    shares = {
        a.tensor: float(values[min(values, key=lambda b: abs(b - bits))].min()) / prober.metric.power
        for a, values in zip(network.activations, measured.activations, strict=True)
        if a.tensor not in fallback.tensors
    }
    work = _multiplications(network, observation.sizes, prober)
    total, multiplications = sum(shares.values()), sum(work.values())
    patterns = [pattern for pattern, _ in config.pins]
    pinned = {a.tensor for a in network.activations if any(pins(p, a.names) for p in patterns)}
    read = {u.data for x in network.layers for u in x.uses}
    fed = {a.tensor for a in network.activations if not read.isdisjoint(a.feeds)}
    sources = {f: a.tensor for a in network.activations for f in a.feeds}
    result: dict[str, float] = {}
    for product in network.products:
        operands = [sources[o] for o in product.operands]
        own = {o: shares[o] for o in operands if o in shares and o not in fed}
        worth = max(_WORTH * work[product.node] / multiplications, _HARMLESS)
        if sum(own.values()) > worth * total and pinned.isdisjoint(operands):
            result |= own
    return FloatFallback(result, {})


def _multiplications(network: Network, sizes: Mapping[str, int], prober: Prober) -> Mapping[str, int]:
    """Return the multiplications of each layer and product; sizes: elements of each tensor per sample."""
    shapes = shapes_of(network.model, prober.samples, prober.runtime)
    work = {p.node: sizes[p.output] * shapes[p.operands[0]][-1] for p in network.products}
    for layer in network.layers:
        positions = sum(use.linear.positions(sizes[use.output]) for use in layer.uses)
        work[layer.name] = positions * math.prod(layer.linear.shape)
    return work
