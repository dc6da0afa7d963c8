"""After Normalize, all weights are initializers, and the model computes the same."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper, parser

from rdoq_onnx.errors import BudgetError, ModelError
from rdoq_onnx.model.protos import default_opset
from rdoq_onnx.model.sizes import tensor_bytes, weights_as_inputs
from rdoq_onnx.passes import Pass, run_passes
from rdoq_onnx.passes.normalization.normalize import Normalize
from tests.conftest import OrtRun, deviation, feeds_for, random_feeds, real_models


def normalized(text: str) -> tuple[ModelProto, ModelProto]:
    model = parser.parse_model(text)
    return model, run_passes([Normalize()], model)


def ops(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("path", real_models())
def test_real_models_compute_the_same(path: Path, ort_run: OrtRun) -> None:
    model = onnx.load(path)
    result = run_passes([Normalize()], model)
    feeds = feeds_for(path, model)
    assert deviation(ort_run(result, feeds), ort_run(model, feeds)) < 1e-5
    assert default_opset(result) >= 13
    assert "Constant" not in ops(result)
    assert "Identity" not in ops(result)
    assert run_passes([Normalize()], result) == result


def test_every_form_of_constant(ort_run: OrtRun) -> None:
    model, result = normalized("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x) => (float[2] y, string s, string[2] ss, int64 kept)
        {
          a = Constant<value = float[2] {1, 2}>()
          b = Constant<value_float = 3.0>()
          c = Constant<value_floats = [4.0, 5.0]>()
          i = Constant<value_int = 1>()
          j = Constant<value_ints = [0]>()
          t = Constant<value_string = "one">()
          u = Constant<value_strings = ["one", "two"]>()
          kept = Constant<value_int = 1>()
          d = Add(x, a)  e = Mul(d, b)  f = Add(e, c)
          h = Gather(f, i)  k = Unsqueeze(h, j)  y = Add(f, k)
          s = Identity(t)  ss = Identity(u)
        }""")
    assert Counter(ops(result)) == {"Constant": 1, "Add": 3, "Mul": 1, "Gather": 1, "Unsqueeze": 1, "Identity": 2}
    feeds = random_feeds(model)
    got, expected = ort_run(result, feeds), ort_run(model, feeds)
    np.testing.assert_array_equal(got[0], expected[0])
    assert [list(np.ravel(g)) for g in got[1:]] == [["one"], ["one", "two"], [1]]


def test_identities(ort_run: OrtRun) -> None:
    model, result = normalized("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x, bool c) => (float[2] y, float[2] z, float[2] through, float[2] weight) <float[2] w = {1, 2}>
        {
          a = Identity(x)  v = Identity(w)  b = Mul(a, v)  d = Identity(b)
          y = Identity(d)  z = Identity(d)  through = Identity(a)  weight = Identity(v)
          e = Identity(d)
          unused = If (c) <then_branch = f () => (float[2] p) { p = Neg(e) },
                           else_branch = h () => (float[2] q) { q = Abs(e) }>
        }""")
    assert Counter(ops(model)) == {"Identity": 8, "Mul": 1, "If": 1}
    # y and z are the same tensor, x and w cannot take an output's name: one Identity each.
    assert Counter(ops(result)) == {"Identity": 3, "Mul": 1, "If": 1}
    feeds = random_feeds(model) | {"c": np.array(True)}
    assert deviation(ort_run(result, feeds), ort_run(model, feeds)) == 0


@pytest.mark.parametrize(
    ("version", "call", "left"),
    [
        (6, "Dropout<is_test = 1>(t)", 1),
        (7, "Dropout<ratio = 0.5>(t)", 1),
        (13, "Dropout(t, r)", 1),
        (13, "Dropout(t, r, f)", 1),
        (13, "Dropout(t, r, on)", 2),
        (13, "Dropout(t, r, c)", 2),
    ],
)
def test_idle_dropout_goes(version: int, call: str, left: int) -> None:
    weights = "float r = {0.5}, bool f = {0}, bool on = {1}"
    _, result = normalized(f"""<ir_version: 8, opset_import: ["" : {version}]>
        g (float[2] x, bool c) => (float[2] y) <{weights}> {{ t = Relu(x)  y = {call} }}""")
    assert len(result.graph.node) == left


def test_dropout_whose_mask_is_read_stays() -> None:
    _, result = normalized("""<ir_version: 8, opset_import: ["" : 13]>
        g (float[2] x) => (float[2] y, bool[2] m) { t = Relu(x)  y, n = Dropout(t)  m = Not(n) }""")
    assert ops(result) == ["Relu", "Dropout", "Not"]


def test_old_model_with_weights_as_inputs(ort_run: OrtRun) -> None:
    model, result = normalized("""<ir_version: 3, opset_import: ["ai.onnx.ml" : 2, "" : 9]>
        g (float[N, 3, 4, 4] x, float[2, 3, 1, 1] w, float[4] s) => (float[N, 256] y)
        <float[2, 3, 1, 1] w = {1, 2, 3, 4, 5, 6}, float[4] s = {1, 1, 2, 2}>
        { a = Conv(x, w)  b = Upsample<mode = "nearest">(a, s)  c = Flatten(b)  d = Concat<axis = 1>(c, c)
          y = Softmax<axis = 0>(d) }""")
    assert [i.name for i in result.graph.input] == ["x"]
    assert {t.name for t in result.graph.initializer} >= {"w", "s"}
    assert result.ir_version >= 7
    assert [(o.domain, o.version) for o in result.opset_import] == [("ai.onnx.ml", 2), ("", 13)]
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)}
    assert deviation(ort_run(result, feeds), ort_run(model, feeds)) < 1e-6


def test_functions_and_subgraphs_survive_a_raised_opset(ort_run: OrtRun) -> None:
    model, result = normalized("""<ir_version: 8, opset_import: ["" : 11, "local" : 1]>
        main (float[N, 3] x, bool c) => (float[N, 3] y) <float[3] w = {1, 2, 3}>
        {
          t = local.twice(x)
          y = If (c) <then_branch = yes () => (float[N, 3] a)
                        { b = Unsqueeze<axes = [0]>(t)  d = Squeeze<axes = [0]>(b)  a = Mul(d, w) },
                      else_branch = no () => (float[N, 3] e) { e = Sub(t, w) }>
        }
        <domain: "local", opset_import: ["" : 11]>
        twice (a) => (b) { b = Add(a, a) }""")
    assert ops(result) == ["Add", "If"]
    assert default_opset(result) == 13
    for c in (True, False):
        feeds = random_feeds(model) | {"c": np.array(c)}
        assert deviation(ort_run(result, feeds), ort_run(model, feeds)) == 0


def test_large_weights_are_kept_from_the_converter(ort_run: OrtRun) -> None:
    model = parser.parse_model("""<ir_version: 6, opset_import: ["" : 11]>
        g (float[2, 64] x) => (float[2, 64] y) { t = MatMul(x, w)  y = Softmax<axis = 1>(t) }""")
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    model.graph.initializer[0].doc_string = "kept"
    assert tensor_bytes(model) == weight.nbytes
    assert [i.name for i in weights_as_inputs(model).graph.input] == ["x", "w"]
    result = run_passes([Normalize()], model)
    assert result.graph.initializer[-1] == model.graph.initializer[0]
    feeds = random_feeds(model)
    assert deviation(ort_run(result, feeds), ort_run(model, feeds)) < 1e-6


def test_a_newer_opset_is_kept() -> None:
    _, result = normalized("""<ir_version: 8, opset_import: ["" : 18]>
        g (float[2] x) => (float[2] y) { y = Relu(x) }""")
    assert default_opset(result) == 18
    assert result.ir_version == 8


def test_names_are_unique_and_stable() -> None:
    _, result = normalized("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x) => (float[2] y)
        { a = Relu(x)  [n] b = Neg(a)  [n] c = Neg(b)  [Relu_0] d = Relu(c)  y = Relu(d) }""")
    assert [n.name for n in result.graph.node] == ["Relu_1", "n", "n_0", "Relu_0", "Relu_2"]


def test_a_failed_conversion_is_one_line_with_the_opset() -> None:
    with pytest.raises(ModelError, match=r"pass Normalize failed: opset 6 .* opset 13 or later") as caught:
        normalized("""<ir_version: 3, opset_import: ["" : 6]>
            g (float[2, 3] x, float[5] b) => (float[2, 3] y) { y = Add<broadcast = 1, axis = 1>(x, b) }""")
    assert "\n" not in str(caught.value)


def test_what_only_a_newer_opset_has_is_refused_with_an_earlier_one() -> None:
    with pytest.raises(ModelError, match=r"opset 28 could not be lowered to 27: .* opset 27 or earlier"):
        normalized("""<ir_version: 14, opset_import: ["" : 28]>
            g (int8[3] x, int8[3] y) => (int8[3] z) { z = BitShift <direction = "RIGHT"> (x, y) }""")


@dataclass(frozen=True)
class Fails(Pass):
    """Raises `error` in `requires`, or leaves a model that is not valid."""

    error: Exception | None = None

    def requires(self, model: ModelProto) -> None:
        if self.error:
            raise self.error

    def __call__(self, model: ModelProto) -> ModelProto:
        result = ModelProto()
        result.CopyFrom(model)
        result.graph.node[0].op_type = "NoSuchOp"
        return result


@pytest.mark.parametrize(
    ("error", "kind"),
    [(None, ModelError), (ValueError("two\nlines"), ModelError), (BudgetError("too small"), BudgetError)],
)
def test_a_failing_pass_is_named_with_those_before_it(error: Exception | None, kind: type[Exception]) -> None:
    model = helper.make_model(parser.parse_graph("g (float[2] x) => (float[2] y) { y = Relu(x) }"))
    with pytest.raises(kind, match=r"pass Fails failed: .*ran before it: Normalize\)") as caught:
        run_passes([Normalize(), Fails(error)], model)
    assert "\n" not in str(caught.value)


def test_an_invalid_model_is_refused_before_any_pass() -> None:
    model = helper.make_model(parser.parse_graph("g (float[2] x) => (float[2] y) { y = NoSuchOp(x) }"))
    with pytest.raises(ModelError, match="not valid ONNX"):
        run_passes([], model)
