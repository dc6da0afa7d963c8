"""Batch sizes of the passes that compute sums over samples: as large as memory allows."""

import math
from collections.abc import Callable
from typing import TypeVar

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.errors import ShortageError
from rdoq_onnx.gradients.plan import LEAST_DRAWS, MOST_DRAWS, rows_of
from rdoq_onnx.model.layers import input_channels
from rdoq_onnx.observation.observe import Observation
from rdoq_onnx.system.runtime import Runtime

T = TypeVar("T")

_MAX_BATCH = 512  # samples; larger batches hardly run faster
_LARGEST = (1 << 31) - 1  # elements of a tensor that CUDA kernels can count
_ROWS = (1 << 16) - 1  # axis 0 that every cuDNN kernel supports; im2col_nodes.py puts channels there
_CACHED = 320 << 20  # bytes of tensors and adjoints on the host; beyond this, caches help less
_SHARE = 2  # a batch may take 1 / _SHARE of the device memory; the rest covers what the estimate misses
_BATCHES = 8  # at least, of samples that fit into fewer
_WORTH_SHARING = 1 << 25  # elements of all tensors of the samples: a few seconds of work
_DRAWN = 1 << 28  # elements of all tensors of the samples that v are drawn for
_WEIGHT = 4 * (1 + 3 * 9)  # bytes of a weight and its changes under three rounding variants at nine widths


def with_memory(run: Callable[[int], T], batch: int, observation: Observation) -> T:
    """Return `run(batch)`, halving the batch for as long as memory does not suffice.

    Raises ShortageError if memory does not suffice for a single sample either.
    """
    while True:
        try:
            return run(batch)
        except ShortageError:
            if batch == 1 or not observation.batching.stackable:
                raise
        batch = -(-batch // 2)


def least_draws(observation: Observation) -> int:
    """Return how many v a curve averages at least: as many as their work affords.

    More of them tell the channels and the variants of rounding apart; of a small network they cost little.
    """
    return int(min(max(_DRAWN // max(sum(observation.sizes.values()), 1), LEAST_DRAWS), MOST_DRAWS))


def forward_batch(network: Network, observation: Observation, runtime: Runtime, samples: int) -> int:
    """Return the batch size, at most `samples`, of forward passes that sum over the layers' inputs."""
    return _on_device(network, observation, runtime, samples) or _shared(
        observation.batching.size, observation, samples
    )


def reverse_batch(
    network: Network, observation: Observation, runtime: Runtime, samples: int, exact: bool = True
) -> int:
    """Return the batch size, at most `samples`, of reverse passes; exact: as in `host_batch`."""
    return _on_device(network, observation, runtime, samples) or host_batch(observation, samples, exact)


def host_batch(observation: Observation, samples: int, exact: bool = True) -> int:
    """Return the batch size of reverse passes that sum in numpy; the host holds one set of adjoints for each v.

    exact: whether v runs over the unit vectors if outputs are few.
    """
    size = observation.batching.size
    if observation.batching.stackable:
        sets = 2 + (rows_of(observation.metric.elements) if exact else 1)
        each = int(4 * sets * sum(observation.sizes.values()) * observation.batching.peak)
        size = max(min(size * 3 // sets, _CACHED // max(each, 1)), 1)
    return _shared(size, observation, samples)


def _shared(size: int, observation: Observation, samples: int) -> int:
    """Return a batch size up to `size` that makes enough batches for several processes to share, if that is work."""
    elements = samples * sum(observation.sizes.values())
    if not observation.batching.stackable or elements < _WORTH_SHARING:
        return size
    return min(size, -(-samples // _BATCHES))


def _on_device(network: Network, observation: Observation, runtime: Runtime, samples: int) -> int:
    """Return the batch size for sums computed on a device, in batches of equal size; 0 if they are not.

    A power of two bounds it, so that it hardly depends on the current memory use of other programs.
    """
    if not runtime.in_graph or not observation.batching.stackable:
        return 0
    sizes, uses = observation.sizes, [(u.linear, u.output) for x in network.layers for u in x.uses]
    largest = max((x.group * x.inputs * x.positions(sizes[output]) for x, output in uses), default=1)
    channels = max((input_channels(x) for x, _ in uses if len(x.shape) > 2), default=1)
    each = 12 * sum(sizes.values()) + 8 * largest  # bytes: tensors and adjoints; X, and X transposed for the product
    each = int(each * observation.batching.peak)
    room = runtime.memory() - _WEIGHT * sum(math.prod(x.linear.shape) for x in network.layers)
    fits = max(min(room // _SHARE // each, _LARGEST // largest, _ROWS // channels, _MAX_BATCH), 1)
    return -(-samples // -(-samples // (1 << fits.bit_length() - 1)))
