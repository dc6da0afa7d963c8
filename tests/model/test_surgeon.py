"""An edit changes what it should, and nothing else."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper, parser

from rdoq_onnx.errors import ModelError
from rdoq_onnx.model import surgeon
from rdoq_onnx.model.surgeon import Graph, Tensor
from tests.conftest import OrtRun, deviation, feeds_for, random_feeds, real_models

BRANCHES = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[N, 3] x, bool c) => (float[N, 3] y, float[N, 3] t)
<float[3] w = {1, 2, 3}, float[3] unused = {4, 5, 6}, float[1] k = {2}>
{
  t = Relu(x)
  y = If (c) <
    then_branch = yes () => (float[N, 3] a) <float[3] own = {1, 1, 1}> { b = Mul(t, w)  a = Add(b, own) },
    else_branch = no () => (float[N, 3] a) <float[3] own = {2, 2, 2}> { b = Mul(t, k)  a = Sub(b, own) }
  >
  dead = Neg(x)
}
"""
CALL = """
<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
main (float[N] x) => (float[N] y) { y = local.twice(x) }
<domain: "local", opset_import: ["" : 17]>
twice (a) => (b) { b = Add(a, a) }
"""


def parse(text: str) -> ModelProto:
    model = parser.parse_model(text)
    onnx.checker.check_model(model)
    return model


def unchanged(_: Graph) -> None:
    pass


def tensor(graph: Graph, name: str) -> Tensor:
    return graph.tensors()[name]


def decorate(model: ModelProto) -> ModelProto:
    """Everything that a round trip through graphsurgeon's own exporter loses or fails on."""
    model.domain, model.model_version, model.doc_string = "org.example", 7, "model"
    model.metadata_props.add(key="author", value="somebody")
    graph = model.graph
    graph.doc_string = "graph"
    graph.quantization_annotation.add(tensor_name="x")
    graph.value_info.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, ["N", 3], "value"))
    graph.value_info.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [3]))
    graph.initializer[0].doc_string = "weight"
    node = graph.node[0]
    node.doc_string, node.name = "node", "first"
    node.metadata_props.add(key="scope", value="block")
    custom = graph.node.add(op_type="Custom", domain="org.example", input=["t"], output=["u"])
    custom.attribute.append(helper.make_attribute("empty", [], attr_type=AttributeProto.INTS))
    custom.attribute.append(AttributeProto(name="bytes", type=AttributeProto.STRING, s=b"\xff\xfe"))
    texts = AttributeProto(name="texts", type=AttributeProto.STRINGS, strings=[b"ok", b"\xff"])
    custom.attribute.append(texts)
    two = [numpy_helper.from_array(np.ones(2, np.float32), n) for n in ("p", "q")]
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
    for name, value in (("tensors", two), ("kind", kind), ("value", two[0])):
        custom.attribute.append(helper.make_attribute(name, value))
    optional = helper.make_optional_type_proto(kind)
    graph.input.append(helper.make_value_info("maybe", optional))
    model.opset_import.add(domain="org.example", version=3)
    return model


@pytest.mark.parametrize("text", [BRANCHES, CALL])
def test_identity_edit_is_lossless(text: str) -> None:
    model = parse(text)
    assert surgeon.edit(model, unchanged) == model


def test_identity_edit_keeps_what_graphsurgeon_loses(capsys: pytest.CaptureFixture[str]) -> None:
    model = decorate(parse(BRANCHES))
    assert surgeon.edit(model, unchanged) == model
    assert capsys.readouterr().out == ""


def test_reading_values_changes_nothing() -> None:
    model = decorate(parse(BRANCHES))

    def read(graph: Graph) -> None:
        for t in graph.tensors().values():
            surgeon.values(t)
        surgeon.values(graph.nodes[-1].attrs["value"])

    assert surgeon.edit(model, read) == model


def test_the_caller_s_model_is_not_altered() -> None:
    model, twin = parse(BRANCHES), parse(BRANCHES)

    def change(graph: Graph) -> None:
        tensor(graph, "x").name = "z"
        for inner in graph.subgraphs():
            weight = inner.nodes[1].inputs[1]
            weight.values = weight.values * 2
            weight.name = surgeon.fresh(graph, "renamed")
        graph.nodes[0].attrs["alpha"] = 1

    assert surgeon.edit(model, change) != twin
    assert model == twin


@pytest.mark.parametrize("path", real_models())
def test_identity_edit_of_real_models(path: Path) -> None:
    model = onnx.load(path)
    assert surgeon.edit(model, unchanged) == model


@pytest.mark.parametrize("path", real_models())
def test_identity_after_every_tensor_of_real_models(path: Path, ort_run: OrtRun) -> None:
    model = onnx.load(path)

    def change(graph: Graph) -> None:
        def copy(t: Tensor) -> Tensor:
            return surgeon.append(graph, "Identity", [t], "copy", like=t)

        for t in [t for node in graph.nodes for t in node.outputs if t.name]:
            surgeon.insert_after(graph, t, copy)

    changed = surgeon.edit(model, change)
    onnx.checker.check_model(changed)
    assert [o.name for o in changed.graph.output] == [o.name for o in model.graph.output]
    outputs = sum(bool(name) for node in model.graph.node for name in node.output)
    assert len(changed.graph.node) == len(model.graph.node) + outputs
    feeds = feeds_for(path, model)
    assert deviation(ort_run(changed, feeds), ort_run(model, feeds)) < 1e-5


def test_long_chain_in_any_order() -> None:
    count = 3000
    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"], name=f"n{i}") for i in range(count)]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("t0", f"t{count}")]
    model = helper.make_model(helper.make_graph(nodes, "chain", ends[:1], ends[1:]))

    def reverse(graph: Graph) -> None:
        graph.nodes = graph.nodes[::-1]

    assert surgeon.edit(model, unchanged) == model
    assert surgeon.edit(model, reverse) == model


def test_cycle_is_refused() -> None:
    model = parse("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[1] x) => (float[1] z) { y = Relu(x)  z = Neg(y) }""")

    def close(graph: Graph) -> None:
        graph.nodes[0].inputs[0] = graph.outputs[0]

    with pytest.raises(ModelError, match="cycle"):
        surgeon.edit(model, close)


def add_one(graph: Graph, name: str = "t") -> None:
    one = surgeon.constant(surgeon.fresh(graph, "w"), np.ones(1, np.float32))
    t = tensor(graph, name)
    surgeon.insert_after(graph, t, lambda t: surgeon.append(graph, "Add", [t, one], "plus", like=t))


def test_insert_after_reaches_subgraphs_and_the_output(ort_run: OrtRun) -> None:
    model = parse(BRANCHES)
    changed = surgeon.edit(model, add_one)
    onnx.checker.check_model(changed)
    assert [n.op_type for n in changed.graph.node] == ["Relu", "Add", "If", "Neg"]
    assert list(changed.graph.output) == list(model.graph.output)
    assert {t.name for t in changed.graph.initializer} == {"w", "unused", "k", "w_1"}
    x = np.array([[1, -1, 2]], np.float32)
    for c, expected in ((True, [[3, 3, 10]]), (False, [[2, 0, 4]])):
        y, t = ort_run(changed, {"x": x, "c": np.array(c)})
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(t, np.maximum(x, 0) + 1)


def test_insert_after_can_leave_the_output(ort_run: OrtRun) -> None:
    def change(graph: Graph) -> None:
        t = tensor(graph, "t")
        surgeon.insert_after(graph, t, lambda t: surgeon.append(graph, "Neg", [t], "minus", like=t), outputs=False)

    x = np.array([[1, -1, 2]], np.float32)
    y, t = ort_run(surgeon.edit(parse(BRANCHES), change), {"x": x, "c": np.array(False)})
    np.testing.assert_array_equal(y, [[-4, -2, -6]])
    np.testing.assert_array_equal(t, [[1, 0, 2]])


def test_insert_after_an_input_that_is_an_output_too() -> None:
    model = parse("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[1] x) => (float[1] x, float[1] y) { y = Relu(x) }""")
    changed = surgeon.edit(model, lambda graph: add_one(graph, "x"))
    onnx.checker.check_model(changed)
    assert [o.name for o in changed.graph.output] == ["x", "y"]
    assert list(changed.graph.node[1].input) == list(changed.graph.node[0].output)


def test_bypass_renames_the_producer_s_output(ort_run: OrtRun) -> None:
    model = parse("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x) => (float[2] y) { t = Neg(x)  y = Identity(t) }""")
    done: list[bool] = []
    changed = surgeon.edit(model, lambda graph: done.append(surgeon.bypass(graph, graph.nodes[1])))
    assert done == [True]
    assert [(n.op_type, list(n.output)) for n in changed.graph.node] == [("Neg", ["y"])]
    feeds = random_feeds(model)
    assert deviation(ort_run(changed, feeds), ort_run(model, feeds)) == 0


def test_bypass_refuses_where_a_name_would_be_lost() -> None:
    model = parse("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x) => (float[2] y) { y = Identity(x) }""")
    done: list[bool] = []
    changed = surgeon.edit(model, lambda graph: done.append(surgeon.bypass(graph, graph.nodes[0])))
    assert done == [False]
    assert changed == model


def test_bypass_of_a_whole_chain_whose_end_a_body_reads(ort_run: OrtRun) -> None:
    chain = " ".join(f"t{i + 1} = Identity(t{i})" for i in range(50))
    model = parse(f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x, bool p) => (float[2] y) {{ t0 = Neg(x) {chain}
            y = If(p) <then_branch = a () => (float[2] u) {{ u = Abs(t50) }},
                       else_branch = b () => (float[2] v) {{ v = Relu(t50) }}> }}""")

    def bypass_all(graph: Graph) -> None:
        assert all(surgeon.bypass(graph, node) for node in graph.nodes if node.op == "Identity")

    changed = surgeon.edit(model, bypass_all)
    onnx.checker.check_model(changed)
    assert [n.op_type for n in changed.graph.node] == ["Neg", "If"]
    feeds = {"x": np.array([-1, 2], np.float32), "p": np.array(True)}
    assert deviation(ort_run(changed, feeds), ort_run(model, feeds)) == 0


def test_newly_unused_nodes_and_weights_go_those_unused_before_stay() -> None:
    model = parse(BRANCHES)

    def change(graph: Graph) -> None:
        graph.outputs = [t for t in graph.outputs if t.name == "t"]

    changed = surgeon.edit(model, change)
    onnx.checker.check_model(changed)
    assert [n.op_type for n in changed.graph.node] == ["Relu", "Neg"]
    assert [t.name for t in changed.graph.initializer] == ["unused"]


def test_an_unused_node_that_becomes_a_constant_goes() -> None:
    model = parse("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x) => (float[2] y) { unused = Constant<value = float[1] {1}>()  y = Relu(x) }""")
    changed = surgeon.edit(model, lambda graph: surgeon.freeze(graph.nodes[0].outputs[0], np.ones(1, np.float32)))
    onnx.checker.check_model(changed)
    assert [n.op_type for n in changed.graph.node] == ["Relu"]


def test_edits_of_attributes_types_inputs_and_opsets() -> None:
    model = parse("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 3] x) => (float[3, 2] y) { t = Relu(x)  y = Transpose<perm = [1, 0]>(t) }""")

    def change(graph: Graph) -> None:
        transpose = graph.nodes[1]
        del transpose.attrs["perm"]
        extra = surgeon.Variable("extra", np.float32, [2, 3])
        graph.inputs.append(extra)
        total = surgeon.append(graph, "FusedAdd", [transpose.inputs[0], extra], "sum")
        graph.nodes[-1].domain = "org.example"
        total.dtype, total.shape = np.dtype(np.float32), ["N", 3]
        transpose.inputs[0] = total
        softmax = surgeon.append(graph, "Softmax", [transpose.outputs[0]], "p", attrs={"axis": 1})
        softmax.dtype, softmax.shape = np.dtype(np.float16), [3, 2]
        graph.outputs = [softmax]
        graph.opset = 21

    changed = surgeon.edit(model, change)
    onnx.checker.check_model(changed)
    _, total, transpose, softmax = changed.graph.node
    assert not transpose.attribute
    assert helper.get_node_attr_value(softmax, "axis") == 1
    assert [i.name for i in changed.graph.input] == ["x", "extra"]
    assert changed.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    assert [i.name for i in changed.graph.value_info] == list(total.output)
    assert [(o.domain, o.version) for o in changed.opset_import] == [("", 21), ("org.example", 1)]


def test_sub_byte_constants() -> None:
    model = parse("""<ir_version: 13, opset_import: ["" : 25]>
        g (float[3] x) => (float[3] y) { y = Relu(x) }""")
    kinds = (TensorProto.INT4, TensorProto.UINT4, TensorProto.INT2, TensorProto.UINT2)
    stored = {}
    for kind in kinds:
        array = np.array([1, 0, 1]).astype(helper.tensor_dtype_to_np_dtype(kind))
        stored[f"p{kind}"] = numpy_helper.from_array(array, f"p{kind}")

    def change(graph: Graph) -> None:
        for name, proto in stored.items():
            for value in (proto, numpy_helper.to_array(proto)):
                constant = surgeon.constant(surgeon.fresh(graph, name), value)
                graph.outputs.append(surgeon.append(graph, "Cast", [constant], f"c{name}", attrs={"to": 1}))
                graph.outputs[-1].dtype, graph.outputs[-1].shape = np.dtype(np.float32), [3]

    changed = surgeon.edit(model, change)
    onnx.checker.check_model(changed)
    found = {t.name: t for t in changed.graph.initializer}
    assert len(found) == 8
    for name, proto in stored.items():
        assert found[name] == proto
        assert found[f"{name}_1"].raw_data == proto.raw_data
        assert found[f"{name}_1"].data_type == proto.data_type


def test_two_constants_of_one_name_are_refused() -> None:
    model = parse(BRANCHES)

    def change(graph: Graph) -> None:
        for value in (1, 2):
            clash = surgeon.constant("clash", np.full(1, value, np.float32))
            graph.outputs.append(surgeon.append(graph, "Neg", [clash], "minus", like=tensor(graph, "t")))

    with pytest.raises(ModelError, match="clash"):
        surgeon.edit(model, change)
