"""Shapes of all tensors, from one run."""

import onnx
from onnx import helper

from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.system.runtime import Runtime


def shapes_of(model: onnx.ModelProto, samples: Samples, runtime: Runtime) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of the main graph in a run of two samples, or of as many as the model takes."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    graph = probed.graph
    names = [o for n in model.graph.node for o in n.output if o]
    graph.node.extend(helper.make_node("Shape", [name], [f"shape/{name}"], f"shape/{name}") for name in names)
    del graph.output[:]
    graph.output.extend(onnx.ValueInfoProto(name=f"shape/{name}") for name in names)
    session = runtime.session(probed, "none")
    feeds = next(samples.batches(2))
    values = dict(zip(names, session.run(feeds), strict=True))
    return {
        **{name: tuple(int(n) for n in value) for name, value in values.items()},
        **{name: tuple(value.shape) for name, value in feeds.items()},
    }
