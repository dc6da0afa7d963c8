"""First and second moments of every layer's input, for error-compensated rounding.

Sums run over samples and positions, batch by batch; memory depends on the layers, not on the number of samples. On the
host, a random subset of very many positions represents all of them.

A layer behind a global pool has one input vector per sample, too few for its many inputs. The positions before the pool
have a similar covariance and are far more numerous: N samples of K inputs mix N parts of their own covariance with K
parts of the positions'.

Compensation moves errors to where the samples show little, and few or like samples show little of what others need. So
the second moment is shrunk towards what needs no data, a multiple of the identity (Ledoit and Wolf, 2004): by at least
a share of the mean diagonal that grows with the inputs for each vector seen, K / N.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.candidates.blocks import in_parts
from rdoq_onnx.gradients.sum_graph import SumGraph
from rdoq_onnx.model.graph import Graph, attribute
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.model.linear import Linear
from rdoq_onnx.system.runtime import Tensor

# Shares of the mean diagonal added to a second moment; few samples need more.
_DAMPINGS = (0.02, 0.3)
_DAMPING = 0.1
# At least _PER_VECTOR · K / N, at most _MOST: at K / N = 0.5, vectors of one genre, 0.3 suits other genres best.
_PER_VECTOR, _MOST = 0.5, 0.5
_SHARES = (0.1, 0.5)  # of the covariance in the sensitivity
_POOLS = frozenset({"GlobalAveragePool", "ReduceMean"})
# Least number of positions that represent all, in total and per input.
_POSITIONS, _PER_INPUT = 4096, 16

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """mean [G, K] of the unfolded input, and covariance [G·parts, B, B] of its parts (see `in_parts`).

    sensitivity: F of sensitivity.py in the same form; None if not computed. vectors: the number N that they are of.
    """

    mean: Float
    covariance: Float
    sensitivity: Float | None = None
    vectors: int = 0

    @property
    def least_damping(self) -> float:
        """The least share of the mean diagonal that is added; 0 where N is not known."""
        inputs = self.covariance.shape[-1]
        return min(_PER_VECTOR * inputs / self.vectors, _MOST) if self.vectors else 0.0

    def variants(self) -> tuple[tuple[Float, float], ...]:
        """Return second moments to fit rounding under, each with its damping as a share of the mean diagonal.

        Which suits a layer best depends on the number of samples per input; curves on other samples decide.
        """
        least = self.least_damping
        if self.sensitivity is None:
            return tuple((self.covariance, max(damping, least)) for damping in _DAMPINGS)
        mixed = (blended(self.sensitivity, self.covariance, share) for share in _SHARES)
        few, more = max(_DAMPINGS[0], least), max(_DAMPING, least)
        return (*((second, few) for second in mixed), (self.covariance, more))


def blended(one: Float, other: Float, share: float) -> Float:
    """Blend `one` with a `share` of `other`, scaled to the same trace; both [G, B, B]."""
    own, foreign = (np.einsum("gkk->g", m)[:, None, None] for m in (one, other))
    positive = (own > 0) & (foreign > 0)
    scaled = np.where(positive, own / np.where(positive, foreign, 1.0), 1.0) * other
    result: Float = np.where(positive, (1 - share) * one + share * scaled, one + scaled)
    return result


@dataclass(frozen=True)
class _Pool:
    """A mean over all positions of `tensor` [N, C, ...]; axes: those of the node, None for all positions."""

    tensor: str
    axes: tuple[int, ...] | None

    @classmethod
    def before(cls, layer: Layer, graph: Graph) -> "_Pool | None":
        """Return the pool that produces the only input of `layer`, or None."""
        node = graph.producer.get(graph.root(layer.uses[0].data))
        if len(layer.uses) > 1 or layer.linear.group > 1 or node is None or node.op_type not in _POOLS:
            return None
        if node.op_type == "GlobalAveragePool":
            return cls(node.input[0], None)
        axes = graph.constant(node.input[1]) if len(node.input) > 1 else attribute(node, "axes", None)
        return None if axes is None else cls(node.input[0], tuple(int(a) for a in axes))

    def leaves(self, inputs: int, shape: tuple[int, ...]) -> bool:
        """Whether the pool reduces a tensor of `shape` to its channels alone, `inputs` of them."""
        spatial = set(range(2, len(shape)))
        pooled = spatial if self.axes is None else {a % len(shape) for a in self.axes}
        return bool(spatial) and pooled == spatial and shape[1] == inputs


@dataclass
class _Running:
    """Running sums over vectors [G, K]: their number, that of those that they stand for, Σ x, and Σ x xᵀ in parts."""

    count: int
    seen: int
    first: Float
    second: Float

    @classmethod
    def of(cls, linear: Linear) -> "_Running":
        """Return sums over no vectors of a layer's input."""
        first = np.zeros((linear.group, linear.inputs))
        width = in_parts(first[..., None]).shape[1]
        return cls(0, 0, first, np.zeros((linear.group * -(-linear.inputs // width), width, width)))

    def add(self, vectors: NDArray[np.float32], seen: int) -> None:
        """Add vectors [G, K, P], which stand for `seen`."""
        self.count += vectors.shape[-1]
        self.seen += seen
        self.first += vectors.sum(axis=2, dtype=np.float64)
        parts = in_parts(vectors)
        self.second += parts @ parts.swapaxes(1, 2)

    def add_sums(self, values: Iterator[Tensor]) -> None:
        """Add the next three of `values`: the shape of the vectors, their sum, and the sum of their outer products."""
        shape, first, second = (next(values).numpy() for _ in range(3))
        self.count += int(shape[-1])
        self.seen += int(shape[-1])
        self.first += first[..., 0]
        self.second += second

    def sums(self) -> tuple[int, int, Float, Float]:
        return self.count, self.seen, self.first, self.second

    def moments(self) -> Moments:
        mean = self.first / self.count
        parts = in_parts(mean[..., None])
        covariance = self.second / self.count - parts * parts.swapaxes(1, 2)
        # Float32 rounding of the products can make a variance slightly negative.
        index = np.arange(covariance.shape[-1])
        covariance[:, index, index] = np.maximum(covariance[:, index, index], 0.0)
        return Moments(mean, covariance, vectors=self.seen)


def thinned(unfolded: NDArray[np.float32]) -> NDArray[np.int64] | slice:
    """Return the positions of unfolded inputs [samples, G, K, P] that statistics take."""
    count, enough = unfolded.shape[-1], max(_POSITIONS, _PER_INPUT * unfolded.shape[2])
    return _spread(count, enough) if count > 2 * enough else slice(None)


def _spread(size: int, count: int) -> NDArray[np.int64]:
    """Return `count` of `size` indices, one at random per stratum: even steps might alias with a periodic pattern."""
    offsets = np.random.default_rng(0).random(count)
    return ((np.arange(count) + offsets) * (size / count)).astype(np.int64)


class Sums:
    """Running sums of one layer, and of the positions before its pool if it has one."""

    def __init__(self, layer: Layer, graph: Graph) -> None:
        self._layer, self._pool = layer, _Pool.before(layer, graph)
        self._own = _Running.of(layer.linear)
        self._positions = None if self._pool is None else _Running.of(layer.linear)

    @property
    def tensors(self) -> list[str]:
        """Tensors that `add` reads."""
        return [u.data for u in self._layer.uses] + ([] if self._pool is None else [self._pool.tensor])

    def add(self, values: Mapping[str, NDArray[np.float32]], samples: int) -> None:
        for use in self._layer.uses:
            unfolded = use.linear.unfold(values[use.data], samples)
            seen = unfolded.shape[0] * unfolded.shape[-1]
            unfolded = unfolded[..., thinned(unfolded)]
            self._own.add(np.moveaxis(unfolded, 0, 2).reshape(*self._own.first.shape, -1), seen)
        if self._pool is not None and self._positions is not None:
            value, inputs = values[self._pool.tensor], self._own.first.shape[1]
            if self._pool.leaves(inputs, value.shape):
                positions = np.moveaxis(value, 1, 0).reshape(1, inputs, -1)
                self._positions.add(positions, positions.shape[-1])

    def append(self, graph: SumGraph) -> None:
        """Append nodes that compute the sums to a graph that outputs `tensors`."""
        inputs, blocks = self._own.first.shape, self._own.second.shape[:2]
        graph.moments(self._layer, inputs, blocks)
        pool = self._pool if self._positions is not None else None
        if pool is not None and pool.leaves(inputs[1], graph.shapes[pool.tensor]):
            graph.positions(pool.tensor, blocks)
        else:
            self._positions = None

    def add_sums(self, values: Iterator[Tensor]) -> None:
        """Add the sums output by the nodes of `append`."""
        self._own.add_sums(values)
        if self._positions is not None:
            self._positions.add_sums(values)

    def sums(self) -> tuple[Any, ...]:
        """Return the sums, for `moments_of`: those of the layer's input, and of the positions or None."""
        return self._own.sums(), None if self._positions is None else self._positions.sums()


def moments_of(sums: tuple[Any, ...]) -> Moments:
    """Return the moments from the total of `Sums.sums`."""
    own, positions = (None if part is None else _Running(*part) for part in sums)
    assert own is not None
    moments, vectors, inputs = own.moments(), own.count, own.first.shape[1]
    if positions is None or not positions.count:
        return moments
    share = inputs / (inputs + vectors)
    covariance = blended(moments.covariance, positions.moments().covariance, share)
    return replace(moments, covariance=covariance, vectors=own.seen + positions.seen)
