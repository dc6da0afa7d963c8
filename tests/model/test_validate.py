"""Models that would end in a traceback or exhaust memory are refused from their declarations."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

import rdoq_onnx
from rdoq_onnx import cli
from rdoq_onnx.errors import ModelError
from rdoq_onnx.model.external import Place, place
from rdoq_onnx.model.validate import MAX_NESTING, check_model, check_sizes
from tests.conftest import real_models
from tests.fuzz_models import outcomes
from tests.hostile_models import CASES


def model(nodes: str = "y = MatMul (x, w)", signature: str = "(float[N, 4] x) => (float[N, 4] y)") -> onnx.ModelProto:
    parsed = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {signature} {{ {nodes} }}')
    parsed.graph.initializer.append(numpy_helper.from_array(np.ones((4, 4), np.float32), "w"))
    return parsed


def test_a_sound_model_passes() -> None:
    check_model(model())
    check_sizes(model())


@pytest.mark.parametrize("path", real_models())
def test_real_models_pass(path) -> None:
    check_model(onnx.load(path))
    check_sizes(onnx.load(path))


@pytest.mark.parametrize(
    ("dims", "found"),
    [
        ([4, 5], r"is of shape \[4, 5\], but its data has another size"),
        ([-4, -4], "has a negative dimension"),
        ([1 << 40, 4], r"is of shape \[1099511627776, 4\], but its data has another size"),
        ([], "is a scalar, but its data has another size"),
    ],
)
def test_data_other_than_declared(dims, found) -> None:
    broken = model()
    broken.graph.initializer[0].ClearField("dims")
    broken.graph.initializer[0].dims.extend(dims)
    with pytest.raises(ModelError, match=f"tensor 'w' {found}"):
        check_model(broken)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.INT4, TensorProto.BOOL, TensorProto.INT64])
def test_data_of_every_storage(kind) -> None:
    tensor = helper.make_tensor("t", kind, [3], [1, 0, 1])
    sound = model()
    sound.graph.initializer.append(tensor)
    check_model(sound)
    tensor = numpy_helper.from_array(numpy_helper.to_array(tensor), "t")
    sound.graph.initializer[1].CopyFrom(tensor)
    check_model(sound)
    tensor.raw_data += b"0"
    sound.graph.initializer[1].CopyFrom(tensor)
    with pytest.raises(ModelError, match=r"'t' is of shape \[3\], but its data has another size"):
        check_model(sound)


def test_two_initializers_with_one_name() -> None:
    broken = model()
    broken.graph.initializer.add().CopyFrom(broken.graph.initializer[0])
    with pytest.raises(ModelError, match="two initializers are named 'w'"):
        check_model(broken)


def test_a_constant_output() -> None:
    broken = model(signature="(float[N, 4] x) => (float[N, 4] y, float[4, 4] w)")
    with pytest.raises(ModelError, match="output 'w' is a constant initializer"):
        check_model(broken)


def test_graphs_nested_too_deep() -> None:
    broken, graph = model(), helper.make_graph([helper.make_node("Identity", ["x"], ["t"])], "b", [], [])
    for _ in range(MAX_NESTING):
        node = helper.make_node("If", ["c"], ["t"], then_branch=graph, else_branch=graph)
        graph = helper.make_graph([node], "b", [], [])
        if len(graph.node[0].attribute) == 2:
            del graph.node[0].attribute[1]
    broken.graph.node.add().CopyFrom(graph.node[0])
    with pytest.raises(ModelError, match=f"nested over {MAX_NESTING} levels deep"):
        check_model(broken)


def test_a_tensor_too_large_for_memory() -> None:
    huge = model("p = Pad (x, pads) y = ReduceMax <axes = [1]> (p)")
    huge.graph.initializer.append(numpy_helper.from_array(np.array([0, 1 << 40, 0, 0]), "pads"))
    with pytest.raises(ModelError, match="tensor 'p' would take 4,096 GB"):
        check_sizes(huge)
    with pytest.raises(ModelError, match="tensor 'x' would take"):
        check_sizes(model(signature="(float[N, 8000000000, 4] x) => (float[N, 8000000000, 4] y)"))


def test_negative_sizes_of_inputs_and_outputs_are_free() -> None:
    loose = model()
    for value in (loose.graph.input[0], loose.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = -1
    x = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
    assert rdoq_onnx.quantize(loose, {"x": x}, effort="fast", threads=1).report.sqnr_db > 20


def test_models_of_the_highest_optimization_level_are_refused() -> None:
    """Their convolutions hold weights in an order that depends on the processor."""
    blocked = model()
    blocked.graph.node[0].domain = "com.microsoft.nchwc"
    with pytest.raises(ModelError, match="saved by ONNX Runtime at its highest optimization level"):
        check_model(blocked)


def test_broken_files() -> None:
    """A minute's worth of tests/fuzz_models.py, which runs longer by hand."""
    faults = [(n, outcome, said) for n, outcome, said in outcomes(count=80, seed=0, jobs=2) if "FAULT" in outcome]
    assert faults == []


@pytest.mark.parametrize("case", CASES)
def test_hostile_models_are_refused_in_a_line(case, tmp_path, capsys):
    said, make = CASES[case]
    (tmp_path / "in.onnx").write_bytes(make(tmp_path).SerializeToString())
    with pytest.raises(SystemExit) as stop:
        cli.main([str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "--effort", "fast", "--quiet"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert said in line
    assert not (tmp_path / "out.onnx").exists()


def test_external_data_that_are_not_loaded() -> None:
    given = model()
    place(given.graph.initializer[0], Place("w.bin", 0, 64))
    with pytest.raises(
        ModelError, match=r"'w' are in the file 'w\.bin', which is not loaded; give the path of the model"
    ):
        check_model(given)
