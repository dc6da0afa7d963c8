"""Models made to break whoever reads them. Each is refused in a line; bench_refusals.py times that."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, parser

Case = tuple[str, Callable[[Path], ModelProto]]  # what the refusal says, and the maker, which may write files beside


def small(
    nodes: str = "y = MatMul (x, w)", signature: str = "(float[N, 4] x) => (float[N, 4] y)", **values: object
) -> ModelProto:
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {signature} {{ {nodes} }}')
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 4), np.float32), "w"))
    model.graph.initializer.extend(numpy_helper.from_array(np.array(v), name) for name, v in values.items())
    return model


def external(location: str, **more: int) -> ModelProto:
    model = small()
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        weight.external_data.add(key=key, value=str(value))
    return model


def linked(folder: Path) -> ModelProto:
    (folder / "link").symlink_to("/etc/passwd")
    return external("link")


def sparse_file(folder: Path) -> ModelProto:
    """64 GB of zeros that take no room on the disk."""
    with (folder / "zeros").open("wb") as file:
        file.truncate(1 << 36)
    return external("zeros")


def shaped(*dims: int, data: bytes | None = None) -> ModelProto:
    model = small()
    weight = model.graph.initializer[0]
    weight.ClearField("dims")
    weight.dims.extend(dims)
    if data is not None:
        weight.raw_data = data
    return model


def nested(depth: int) -> ModelProto:
    """An If in an If, and so on; from about 33 on protobuf itself does not read it."""

    def body(node: NodeProto) -> GraphProto:
        return helper.make_graph([node], "body", [], [onnx.ValueInfoProto(name=node.output[0])])

    node = helper.make_node("Identity", ["x"], ["t0"])
    for k in range(1, depth):
        other = body(helper.make_node("Identity", ["x"], [f"s{k}"]))
        node = helper.make_node("If", ["p"], [f"t{k}"], then_branch=body(node), else_branch=other)
    model = small(p=True)
    model.graph.node.append(node)
    return model


def doubled(nodes: str) -> ModelProto:
    model = small(nodes)
    model.graph.node.add().CopyFrom(model.graph.node[0])
    return model


def two_initializers() -> ModelProto:
    model = small()
    model.graph.initializer.add().CopyFrom(model.graph.initializer[0])
    return model


CONCATS = " ".join(f"t{k + 1} = Concat <axis = 1> (t{k}, t{k})" for k in range(40))
CASES: dict[str, Case] = {
    "external data: absolute path": ("outside the model's folder", lambda _: external("/etc/passwd")),
    "external data: parent folder": ("outside the model's folder", lambda _: external("a/../../b")),
    "external data: symbolic link": ("is a symbolic link", linked),
    "external data: device": ("outside the model's folder", lambda _: external("/dev/zero")),
    "external data: 64 GB": ("is longer than", sparse_file),
    "external data: beyond the end": ("is missing", lambda _: external("none", offset=1 << 62, length=1 << 62)),
    "tensor of 2^80 elements": ("overflow", lambda _: shaped(1 << 40, 1 << 40, data=b"")),
    "tensor larger than its data": ("too small", lambda _: shaped(1 << 20, 4)),
    "input of 2^40 columns": ("GB", lambda _: small("y = MatMul (x, w)", f"(float[N, {1 << 40}, 4] x) => (float y)")),
    "Pad to 2^40": ("GB", lambda _: small("p = Pad (x, n) y = MatMul (p, w)", n=[1 << 40, 0, 0, 0])),
    "ConstantOfShape of 2^40": (
        "GB",
        lambda _: small("c = ConstantOfShape (n) m = Add (c, x) y = MatMul (m, w)", n=[1 << 40, 4]),
    ),
    "Expand to 2^40": ("GB", lambda _: small("m = Expand (x, n) y = MatMul (m, w)", n=[1 << 40, 1, 4])),
    "40 Concats, each of itself": ("GB", lambda _: small(f"t0 = MatMul (x, w) {CONCATS} y = Relu (t40)")),
    "40 Concats of a weight": (
        "computed from constants",
        lambda _: small(f"t0 = Transpose (w) {CONCATS} y = MatMul (x, t40)"),
    ),
    "cycle": ("topologically sorted", lambda _: small("a = MatMul (b, w) b = Relu (a) y = Add (a, x)")),
    "node that reads itself": ("topologically sorted", lambda _: small("y = Add (y, x)")),
    "nested 30 deep": ("nested over", lambda _: nested(30)),
    "two nodes make one tensor": ("single static assignment", lambda _: doubled("y = MatMul (x, w)")),
    "two initializers of a name": ("not unique", lambda _: two_initializers()),
    "zero-length weight": ("empty", lambda _: shaped(4, 0, data=b"")),
    "zero-length input": (
        "does not run on synthetic samples",
        lambda _: small("y = MatMul (x, w)", "(float[N, 0, 4] x) => (float y)"),
    ),
    "negative size of a weight": ("Negative", lambda _: shaped(-4, -4)),
}
