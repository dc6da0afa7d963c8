"""The work of a step of gradient descent, the samples that it takes, and how many steps there are."""

from math import prod

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.observation.observe import Observation

BATCH = 32  # samples of a step at most
MOST = 3600  # steps
_LEAST = 50  # fewer do not gain
_ELEMENTS = 1 << 26  # of all tensors of a step's samples, at most
_PASSES = 16  # operations on an element, forward and backward, that take as long as a multiplication of a product
_WORK = 5e12  # multiplications of all steps


def step_batch(observation: Observation) -> int:
    """Return the samples of a step: as many as memory holds the tensors of, up to `BATCH`."""
    return max(1, min(BATCH, _ELEMENTS // max(sum(observation.sizes.values()), 1)))


def default_steps(network: Network, observation: Observation) -> int:
    """Return the number of steps that the work of one allows; 0 where it allows too few to gain."""
    sizes = observation.sizes
    products = sum(
        prod(layer.linear.shape) * use.linear.positions(sizes[use.output])
        for layer in network.layers
        for use in layer.uses
    )
    work = step_batch(observation) * (products + _PASSES * sum(sizes.values()))
    steps = min(MOST, int(_WORK / max(work, 1)))
    return steps if steps >= _LEAST else 0
