"""Names: shorter, unique, the same model; the author's names stay."""

from collections import Counter
from itertools import islice

import numpy as np
import onnx
import pytest
from onnx import TensorProto, checker, numpy_helper, parser
from onnx.helper import make_tensor_value_info

from rdoq_onnx.model.protos import all_names, all_nodes
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.packing.shorten_names import ShortenNames, _names
from tests.conftest import ROOT, random_feeds

BRANCHES = """<ir_version: 8, opset_import: ["": 17]>
    g (float[3] x, bool choice) => (float[3] y)
    <float weight_scale = {2}, float[3] weight_rows = {1, 2, 3}>
    {
        product_of_both = Mul (x, weight_rows)
        chosen = If (choice) <
            then_branch = one () => (float[3] then_result) { inner_name = Mul (product_of_both, weight_scale)
                                                             then_result = Identity (inner_name) },
            else_branch = two () => (float[3] else_result) { inner_name = Sub (product_of_both, weight_scale)
                                                             else_result = Neg (inner_name) }
        >
        y = Add (chosen, weight_rows)
    }"""


def branches():
    model = parser.parse_model(BRANCHES)
    for index, node in enumerate(all_nodes(model.graph)):
        node.name = f"long_name_of_node_{index}"
    model.graph.value_info.append(make_tensor_value_info("product_of_both", TensorProto.FLOAT, [3]))
    model.graph.value_info.append(make_tensor_value_info("chosen", TensorProto.FLOAT, [3]))
    annotation = model.graph.quantization_annotation.add(tensor_name="product_of_both")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="weight_scale")
    return model


def run_both(ort_run, model, short):
    checker.check_model(short, full_check=True)
    for choice in (True, False):
        feeds = {"x": np.array([1, -2, 3], np.float32), "choice": np.array(choice)}
        np.testing.assert_array_equal(ort_run(short, feeds)[0], ort_run(model, feeds)[0])


def test_every_name_but_the_interface_is_short(ort_run):
    model = branches()
    short = run_passes([ShortenNames([])], model)
    run_both(ort_run, model, short)
    assert [i.name for i in short.graph.input] == ["x", "choice"]
    assert [o.name for o in short.graph.output] == ["y"]
    assert all(len(name) == 1 for name in all_names(short.graph) if name != "choice")
    assert len(set(all_names(short.graph))) == len(set(all_names(model.graph)))
    assert not short.graph.value_info


def test_names_to_keep_stay_everywhere(ort_run):
    model = branches()
    keep = {"product_of_both", "inner_name", "long_name_of_node_2", "weight_rows"}
    short = run_passes([ShortenNames(keep)], model)
    run_both(ort_run, model, short)
    assert keep < set(all_names(short.graph))
    assert [v.name for v in short.graph.value_info] == ["product_of_both"]
    everything = set(all_names(model.graph))
    assert run_passes([ShortenNames(everything)], model) == model


def test_kept_names_are_not_given_again(ort_run):
    """In a subgraph as in the graph, where the shortest names are taken."""
    model = branches()
    text = onnx.printer.to_text(model)
    for index, name in enumerate(("product_of_both", "inner_name", "weight_scale")):
        text = text.replace(name, "abc"[index])
    model = parser.parse_model(text)
    short = run_passes([ShortenNames(["a", "b", "c"])], model)
    run_both(ort_run, model, short)
    assert len(set(all_names(short.graph))) == len(set(all_names(model.graph)))


def test_annotations_follow():
    short = run_passes([ShortenNames([])], branches())
    (annotation,) = short.graph.quantization_annotation
    product = next(n for n in short.graph.node if n.op_type == "Mul")
    assert annotation.tensor_name == product.output[0]
    scale = next(t.name for t in short.graph.initializer if not t.dims)
    assert [(e.key, e.value) for e in annotation.quant_parameter_tensor_names] == [("SCALE_TENSOR", scale)]


def test_frequent_names_get_the_shortest():
    lines = "".join(f"name_{k} = Neg (name_{k - 1}) " for k in range(1, 80))
    last = "y = Add (name_79, often) t = Add (often, often)"
    graph = f"g (float[2] x) => (float[2] y) {{ name_0 = Neg (x) {lines} {last} }}"
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {graph}')
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(2, np.float32), "often"))
    short = run_passes([ShortenNames([])], model)
    uses = Counter(all_names(short.graph))
    assert short.graph.initializer[0].name == "a"
    assert max(map(len, uses)) == 2


def test_names_are_identifiers_without_repetition():
    names = list(islice(_names(), 60_000))
    assert len(set(names)) == len(names)
    assert [len(n) for n in names] == sorted(len(n) for n in names)
    assert all(n.isidentifier() for n in names)


def test_optional_inputs_and_unnamed_nodes_stay(ort_run):
    graph = "g (float[2] long_input) => (float[2] y) { middle = Clip (long_input, , highest) y = Neg (middle) }"
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {graph}')
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), "highest"))
    short = run_passes([ShortenNames([])], model)
    clip = short.graph.node[0]
    assert (clip.input[0], clip.input[1], len(clip.input[2]), clip.name) == ("long_input", "", 1, "")
    feeds = {"long_input": np.array([0, 3], np.float32)}
    np.testing.assert_array_equal(ort_run(short, feeds)[0], [0, -1])


@pytest.mark.parametrize("name", ["digits_cnn", "digits_vit"])
def test_real_models(ort_run, name):
    model = onnx.load(ROOT / "models" / f"{name}.onnx")
    short = run_passes([ShortenNames([])], model)
    feeds = random_feeds(model)
    for got, expected in zip(ort_run(short, feeds), ort_run(model, feeds), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert short.ByteSize() < model.ByteSize()
