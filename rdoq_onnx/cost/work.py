"""Count the multiplications of each node for one sample.

Every weight of a layer is applied once at each position, so a layer takes K · P · channels of them; a product of
[.., M, K] and [.., K, N] takes (elements of the result) · K.
"""

import math
from collections.abc import Mapping

from onnx.shape_inference import infer_shapes

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.model.layers import Layer, Product, Use
from rdoq_onnx.model.sizes import weights_as_inputs

_INFERRED = 1024  # elements of a constant that shape inference may read


def multiplications(network: Network, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return those of each node of the searched weights, and of each product.

    sizes: elements of each tensor per sample. Looking up rows of a table takes none; the weights of a recurrent cell,
    and others that no product unfolds, count as applied once.
    """
    work = {use.node: _of_use(layer, use, sizes) for layer in network.searched for use in layer.uses}
    if network.products:
        last = _last_axes(network)
        work |= {p.node: _of_product(p, sizes, last) for p in network.products}
    return work


def _of_use(layer: Layer, use: Use, sizes: Mapping[str, int]) -> int:
    weights = math.prod(layer.linear.shape)
    if layer.linear.op_type == "Gather":
        return 0
    if not use.output:
        return weights
    if layer.linear.op_type == "ConvTranspose":  # each input position meets each weight
        return sizes[use.data] // layer.linear.shape[0] * weights
    return use.linear.positions(sizes[use.output]) * weights


def _of_product(product: Product, sizes: Mapping[str, int], last: Mapping[str, int]) -> int:
    """K is the last axis of the left operand; N, that of the right one, tells it as well."""
    left, right = product.operands
    if left in last:
        return sizes[product.output] * last[left]
    return sizes.get(left, sizes[product.output]) * last.get(right, 1)


def _last_axes(network: Network) -> dict[str, int]:
    """Return the last axis of each tensor where shape inference knows it."""
    try:
        graph = infer_shapes(weights_as_inputs(network.model, larger_than=_INFERRED), data_prop=True).graph
    except Exception:  # it rejects many models that run
        graph = network.model.graph
    infos = [*graph.value_info, *graph.input, *graph.output]
    shapes = {info.name: info.type.tensor_type.shape.dim for info in infos}
    return {name: dims[-1].dim_value for name, dims in shapes.items() if dims and dims[-1].dim_value > 0}
