"""Check costs before the long work, and tell about which widths a budget allows."""

from dataclasses import replace

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.config import Config
from rdoq_onnx.cost.tables import at_8_bits, node_costs, typical_widths
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.observation.batching import find_batching, observed_tensors
from rdoq_onnx.system.runtime import Runtime

_OBSERVED = 2  # samples that sizes are taken from


def sizes_of(network: Network, samples: Samples, runtime: Runtime) -> dict[str, int]:
    """Return the elements per sample of the tensors that costs depend on, from a run of some samples."""
    names = observed_tensors(network)
    if not names:
        return {}
    session = runtime.session(with_outputs(network.model, names), "all")
    return find_batching(session, samples.some(_OBSERVED), names)[1]


def priced(network: Network, config: Config, samples: Samples, runtime: Runtime) -> Config:
    """Return `config` with the widths that channel scales are chosen for set to those that its budget is about.

    Raises ConfigError if the cost does not fit the network.
    """
    cost = config.cost
    if cost is None or cost.unmeasured:
        return config
    if config.budget is None and cost.preset:
        return config
    nodes = node_costs(network, sizes_of(network, samples, runtime), cost)
    if config.budget is None:
        return config
    quantized = {f for a in network.activations for f in a.feeds}
    whole = at_8_bits(nodes, quantized)
    share = config.budget.value / 100 if config.budget.percent else config.budget.value / whole if whole else 1.0
    weights, activations = typical_widths(share, nodes, quantized)
    return replace(
        config,
        weight_bits=weights,
        activation_bits=None if config.activation_bits is None else activations,
    )
