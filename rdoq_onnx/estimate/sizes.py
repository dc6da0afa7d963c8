"""Sizes of tensors from shape inference, in place of a pass over the samples: no weight is read, no model loaded."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.errors import RdoqError
from rdoq_onnx.gradients.backward import declared_shapes, static
from rdoq_onnx.model.sizes import weights_as_inputs
from rdoq_onnx.observation.batching import Batching, batch_size, observed_tensors
from rdoq_onnx.observation.distortion import Metric
from rdoq_onnx.observation.observe import Observation
from rdoq_onnx.observation.parts import Part, measured_tensors
from rdoq_onnx.passes.unfusing.unfuse import Unfuse
from rdoq_onnx.system.runtime import Runtime

_SHAPES = 8  # of samples; inferring each takes as long
_CONSTANT = 1024  # elements: larger constants say nothing about shapes


def inferred(network: Network, parts: Sequence[Part], samples: Samples, runtime: Runtime) -> Observation:
    """Return what `observe` would, as far as shapes tell: sizes, batching and output elements, but no values."""
    names, outputs = observed_tensors(network), measured_tensors(parts)
    total, largest, common = dict.fromkeys([*names, *outputs], 0), 0, samples.of_common_shapes(_SHAPES)
    for part in common.by_shape():
        found = _elements(network.model, next(part.batches(1)), samples.batch or 1, list(total), runtime)
        sizes = {name: found.get(name, 0) for name in total}
        largest = max(largest, sum(sizes[name] for name in names))
        total = {name: total[name] + len(part) * size for name, size in sizes.items()}
    average = {name: round(size / max(len(common), 1)) for name, size in total.items()}
    sizes = {name: average[name] for name in names}
    peak = largest / max(sum(sizes.values()), 1) if samples.others else 1.0
    stackable = samples.batch is None
    batching = Batching(batch_size(largest) if stackable else samples.batch or 1, stackable, peak)
    metric = Metric(tuple(parts), (1.0,) * len(outputs), tuple(max(average[name], 1) for name in outputs), 1.0)
    return Observation({}, sizes, metric, batching, len(samples), {})


def inner(network: Network, samples: Samples, observation: Observation, runtime: Runtime) -> int:
    """Return the elements of all tensors of an average sample, at least of those observed."""
    common = samples.of_common_shapes(1)
    found = _elements(network.model, next(common.batches(1)), samples.batch or 1, (), runtime)
    computed = {name for node in network.model.graph.node for name in node.output}
    return max(sum(size for name, size in found.items() if name in computed), sum(observation.sizes.values()))


def _elements(
    model: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]], batch: int, names: Sequence[str], runtime: Runtime
) -> dict[str, int]:
    """Return the elements per sample of each tensor whose rank is known; dimensions that are not count as 1.

    Where one of `names` has such a dimension, ONNX Runtime computes what depends on shapes alone, which shows others.
    """
    # onnx infers no shapes behind fused operators.
    bare = Unfuse(closed=True)(static(weights_as_inputs(model, larger_than=_CONSTANT), feeds))
    shapes = _shapes(bare)
    if not all(name in shapes and all(shapes[name]) for name in names):
        with contextlib.suppress(RdoqError):
            folded = _shapes(runtime.optimized(bare, "basic"))
            shapes |= {n: s for n, s in folded.items() if n not in shapes or not all(shapes[n])}
    return {name: -(-math.prod(max(d, 1) for d in shape) // batch) for name, shape in shapes.items()}


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of known rank; 0 is a dimension that is not known."""
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception:  # it rejects many models that run
        graph = model.graph
    return declared_shapes((*graph.input, *graph.value_info, *graph.output))
