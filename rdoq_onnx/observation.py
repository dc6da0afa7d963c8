"""One forward pass of the float network over the samples: sizes, ranges, reference power, and how samples batch."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.analysis import Network
from rdoq_onnx.distortion import Metric, metric_of
from rdoq_onnx.errors import CalibrationError, RdoqError
from rdoq_onnx.ranges import ends_of, margin, widened, with_ends
from rdoq_onnx.runtime import Runtime, Session
from rdoq_onnx.samples import Samples
from rdoq_onnx.tails import FEW, Tails

_MEMORY = 768 << 20  # bytes of tensors that one batch of the measurement may hold
_MOST = 32
FEW_SAMPLES = 16
_BATCHES = 4096  # the largest that a fixed axis 0 is taken for
_SATURATES = frozenset({"Sigmoid", "Softmax"})
_NOT_FLOAT32 = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
_SPATIAL = frozenset({"Conv", "ConvTranspose", "Resize"})
_RESHAPES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})

Array = NDArray[Any]


@dataclass(frozen=True)
class Batching:
    """size: samples that run together. rides: whether any number of samples can be stacked on axis 0."""

    size: int
    rides: bool


@dataclass(frozen=True)
class Observation:
    """What one pass over the samples shows.

    ranges: least and greatest value of each activation, with a margin where samples are few. sizes: elements of one
    sample of each observed tensor. samples: how many were seen. tails: of activations with few values.
    """

    ranges: Mapping[str, tuple[float, float]]
    sizes: Mapping[str, int]
    metric: Metric
    batching: Batching
    samples: int
    tails: Mapping[str, Tails]

    @property
    def few(self) -> bool:
        """Whether the ends of ranges are known so badly that clipping them is a risk."""
        return self.samples < FEW_SAMPLES

    def reach(self, tensor: str) -> tuple[float, float]:
        """The widest range that a quantizer of the activation may have."""
        low, high = self.ranges[tensor]
        least, greatest = self.tails[tensor].reach if tensor in self.tails else (low, high)
        return min(low, least), max(high, greatest)


def observe(network: Network, samples: Samples, runtime: Runtime) -> Observation:
    """Run the float network over all `samples`.

    Raises CalibrationError if the network does not run on them or its outputs are not finite.
    """
    activations = [a.tensor for a in network.activations]
    outputs = [o.name for o in network.model.graph.output]
    names = _observed(network)
    session = runtime.session(with_outputs(network.model, [*dict.fromkeys([*outputs, *names])]), "all")
    batching, sizes = _batching(session, samples, names)
    ends: dict[str, list[NDArray[np.float64]]] = {n: [] for n in activations}
    few: dict[str, list[Array]] = {n: [] for n in activations if sizes[n] * len(samples) <= FEW}
    seen = with_outputs(network.model, [*dict.fromkeys([*outputs, *few])])
    session = runtime.session(with_ends(seen, activations), "all")

    def run() -> Iterator[list[Array]]:
        for count, feeds in samples.counted_batches(batching.size):
            values = dict(zip(session.outputs, session.run(feeds), strict=True))
            for name in activations:
                ends[name].append(ends_of(name, values, count if batching.rides else 1))
            for name, parts in few.items():
                parts.append(values[name].reshape(-1))
            yield [np.asarray(values[o]) for o in outputs]

    metric = metric_of(outputs, run(), len(samples))
    share = margin(len(samples))
    ranges = {name: widened(np.concatenate(found, axis=1), share) for name, found in ends.items()}
    tails = {name: Tails.of(np.concatenate(parts)) for name, parts in few.items()}
    return Observation(ranges, sizes, metric, batching, len(samples), tails)


def separated(network: Network, samples: Samples, runtime: Runtime) -> Samples:
    """`samples`, with all rows of a run as one sample if the network does not keep them apart.

    Where the model fixes the size of axis 0, that need not be a batch. It is one if another first or last row changes
    nothing of the others. Raises CalibrationError if too few are left to hold some out.
    """
    result = samples if _separate(network, samples, runtime) else samples.inseparable()
    runs = len(result) // (result.batch or 1)
    if runs < 2:
        size = result.rows * (result.batch or 1)
        kind = "sample" if size == 1 else f"batch of {size}"
        raise CalibrationError(
            f"{samples.source} holds {runs} {kind}; at least 2 are needed, one to measure and one to verify"
        )
    return result


def _does_not_run(samples: Samples, error: RdoqError) -> CalibrationError:
    if samples.source != "synthetic":
        return CalibrationError(f"the float model does not run on the samples from {samples.source}: {error}")
    shapes = ", ".join(f"{n!r} {list(a.shape)}" for n, a in (*samples.arrays.items(), *samples.constants.items()))
    return CalibrationError(
        f"the float model does not run on synthetic samples ({shapes}), whose free sizes and integers are guesses; "
        f"give real ones: --calibration samples.npz ({error})"
    )


def _separate(network: Network, samples: Samples, runtime: Runtime) -> bool:
    if samples.batch is None or samples.batch == 1:
        return True
    if samples.batch > _BATCHES:
        return False
    names = list(dict.fromkeys([o.name for o in network.model.graph.output] + _observed(network)))
    session = runtime.session(with_outputs(network.model, names), "all")
    last = samples.batch - 1
    orders = (np.arange(last + 1), np.array([last, *range(1, last + 1)]), np.array([*range(last), 0]))
    try:
        runs = [session.run(samples.feeds(order)) for order in orders]
    except RdoqError as error:
        raise _does_not_run(samples, error) from error
    return all(_apart(samples.batch, *map(np.asarray, values)) for values in zip(*runs, strict=True))


def _observed(network: Network) -> list[str]:
    """The tensors that are quantized, what reaches the layers with their values, and the layers' ends."""
    activations = [a.tensor for a in network.activations]
    feeding = [f for a in network.activations for f in a.feeds]
    layers = [n for x in network.layers for u in x.uses for n in (u.data, u.output)]
    return list(dict.fromkeys([*activations, *feeding, *layers]))


def _apart(batch: int, value: Array, first: Array, last: Array) -> bool:
    """Whether `first` is `value` but for the first sample, and `last` but for the last."""
    if value.ndim == 0 or not value.shape == first.shape == last.shape or len(value) % batch:
        return False
    rows = len(value) // batch
    return _close(value[rows:], first[rows:]) and _close(value[:-rows], last[:-rows])


def targets(model: onnx.ModelProto) -> list[str]:
    """The tensors whose distortion is measured: the outputs of `model`, for a Softmax or Sigmoid what it is made of.

    One that is sure has no slope: around it no perturbation seems to matter, though large ones do. A map of Sigmoids
    (made by a convolution) is measured as it is: some of it is always on the slope, and what becomes of the rest, far
    out, says nothing of the map.
    """
    producer = {o: n for n in model.graph.node for o in n.output}
    names = []
    for output in model.graph.output:
        made = _before_cast(output.name, producer)
        maker = _behind(made, _RESHAPES, producer)
        if maker is None or maker.op_type not in _SATURATES or _is_map(maker, producer):
            names.append(made)
        else:
            names.append(maker.input[0])
    return list(dict.fromkeys(names))


def _behind(tensor: str, passed: frozenset[str], producer: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """What makes `tensor`, in front of nodes of the types `passed`."""
    maker = producer.get(tensor)
    while maker is not None and maker.op_type in passed:
        maker = producer.get(maker.input[0])
    return maker


def _is_map(node: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto]) -> bool:
    source = _behind(node.input[0], _RESHAPES | {"Add"}, producer)  # a bias
    return node.op_type == "Sigmoid" and source is not None and source.op_type in _SPATIAL


def _before_cast(output: str, producer: Mapping[str, onnx.NodeProto]) -> str:
    """What an output of another type is cast from (see passes/widen_floats.py); a float32 output itself."""
    maker = producer.get(output)
    cast = maker is not None and maker.op_type == "Cast" and maker.attribute[0].i in _NOT_FLOAT32
    return maker.input[0] if maker is not None and cast else output


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of `model` with just these outputs, graph inputs among them if named."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {o.name: o for o in model.graph.output}
    del copy.graph.output[:]
    copy.graph.output.extend(known.get(n, onnx.ValueInfoProto(name=n)) for n in names)
    return copy


def _batching(session: Session, samples: Samples, names: Sequence[str]) -> tuple[Batching, dict[str, int]]:
    """Whether samples may share a batch, found out by trying; and the elements of one sample of each tensor.

    They may if two samples in one batch give every tensor the rows that each gives alone.
    """
    step = samples.batch or 1
    try:
        alone = [session.run(feeds) for _, feeds in itertools.islice(samples.counted_batches(1), 2)]
    except RdoqError as error:
        raise _does_not_run(samples, error) from error
    sizes = {n: int(v.size) // step for n, v in zip(session.outputs, alone[0], strict=True) if n in names}
    together = None
    if len(alone) == 2 and samples.batch is None:
        with contextlib.suppress(RdoqError):
            together = session.run(samples.feeds([0, 1]))
    if together is None or not all(_rows(t, a, b) for t, a, b in zip(together, *alone, strict=True)):
        return Batching(step, False), sizes
    held = 4 * 3 * sum(sizes.values())
    return Batching(int(np.clip(_MEMORY // max(held, 1), 1, _MOST)), True), sizes


def _rows(both: Array, first: Array, second: Array) -> bool:
    """Whether `both` is `first` over `second`, up to rounding."""
    both, first, second = np.asarray(both), np.asarray(first), np.asarray(second)
    if first.ndim == 0 or both.shape != (len(first) + len(second), *first.shape[1:]):
        return False
    return _close(np.concatenate([first, second]), both)


def _close(expected: Array, found: Array) -> bool:
    if expected.dtype.kind != "f":
        return bool((expected == found).all())
    scale = float(np.abs(expected).max(initial=0)) or 1.0
    return bool(np.abs(expected - found).max(initial=0) <= 1e-3 * scale)
