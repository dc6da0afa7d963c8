"""How many samples run together where sums over them are made: as many as memory holds."""

import math
from collections.abc import Callable
from typing import TypeVar

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.errors import ShortageError
from rdoq_onnx.gradients.plan import rows_of
from rdoq_onnx.observation.observe import Observation
from rdoq_onnx.system.runtime import Runtime

T = TypeVar("T")

_MAX_BATCH = 512  # samples: more of them hardly run faster
_LARGEST = (1 << 31) - 1  # elements of a tensor that CUDA kernels can count
_ROWS = (1 << 16) - 1  # of axis 0 that all of cuDNN's kernels take; unfolding.py puts channels there
_CACHED = 320 << 20  # bytes of tensors and adjoints on the host: with more of them caches help less
_SHARE = 2  # part of the memory of a device that a batch may take; the rest is for what an estimate misses
_WEIGHT = 4 * (1 + 3 * 9)  # bytes of a weight and what three variants of rounding change it by at nine widths


def with_memory(run: Callable[[int], T], batch: int, observation: Observation) -> T:
    """`run(batch)`; where memory does not suffice, `run` of half as many samples, and so on.

    Raises ShortageError if there is none for a single sample either.
    """
    while True:
        try:
            return run(batch)
        except ShortageError:
            if batch == 1 or not observation.batching.rides:
                raise
        batch = -(-batch // 2)


def forward_batch(network: Network, observation: Observation, runtime: Runtime, samples: int) -> int:
    """How many of `samples` run together where the layers' inputs are summed."""
    return _on_device(network, observation, runtime, samples) or observation.batching.size


def reverse_batch(
    network: Network, observation: Observation, runtime: Runtime, samples: int, exact: bool = True
) -> int:
    """How many of `samples` run together in reverse passes; on the host one set of adjoints for each v is held.

    exact: whether v runs over the unit vectors if outputs are few.
    """
    size = observation.batching.size
    if observation.batching.rides:
        sets = 2 + (rows_of(observation.metric.elements) if exact else 1)
        held = 4 * sets * sum(observation.sizes.values())
        size = max(min(size * 3 // sets, _CACHED // max(held, 1)), 1)
    return _on_device(network, observation, runtime, samples) or size


def _on_device(network: Network, observation: Observation, runtime: Runtime, samples: int) -> int:
    """The same for sums that are made on a device, in batches of one size; 0 where they are not.

    A power of two bounds it, so that it hardly depends on what else takes memory just now.
    """
    if not runtime.in_graph or not observation.batching.rides:
        return 0
    sizes, uses = observation.sizes, [(u.linear, u.output) for x in network.layers for u in x.uses]
    largest = max((x.group * x.inputs * x.positions(sizes[output]) for x, output in uses), default=1)
    channels = max((x.group * x.inputs // math.prod(x.shape[2:]) for x, _ in uses if len(x.shape) > 2), default=1)
    held = 12 * sum(sizes.values()) + 8 * largest  # bytes: tensors and adjoints; X, and X in the order of a product
    room = runtime.memory() - _WEIGHT * sum(math.prod(x.linear.shape) for x in network.layers)
    fits = max(min(room // _SHARE // held, _LARGEST // largest, _ROWS // channels, _MAX_BATCH), 1)
    return -(-samples // -(-samples // (1 << fits.bit_length() - 1)))
