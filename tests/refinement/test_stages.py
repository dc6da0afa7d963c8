"""A model run in stages gives the same values as one run, and continues from values that the caller replaces."""

import weakref

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.refinement.stages import staged
from tests.cases import RUNTIME

STOPS = ["a", "c", "e"]


@pytest.fixture
def model():
    """Branches that cross stages, a shape that follows the batch, an If that reads a tensor around it."""
    found = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 4] x, bool t) => (float[N, 4] y, float[N, 4] z)
        <int64[1] last = {-1}>
        {
          a = MatMul (x, w) b = Relu (a) s = Shape (b) c = MatMul (b, w) d = Add (c, a) r = Reshape (d, s)
          i = If (t) <then_branch = g1 () => (float[N, 4] p) { p = Add (r, b) },
                      else_branch = g2 () => (float[N, 4] q) { q = Identity (x) }>
          e = MatMul (i, w) y = Add (e, x) z = Relu (e)
        }""")
    weight = np.random.default_rng(0).standard_normal((4, 4), np.float32)
    found.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return found


@pytest.fixture
def batches():
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((n, 4), np.float32), "t": np.array(n > 2)} for n in (3, 2)]


def test_stages_give_the_values_of_one_run(model, batches):
    whole = RUNTIME.session(with_outputs(model, STOPS))
    expected = [whole.run(feeds) for feeds in batches]
    found = {name: list(values) for name, values in staged(model, STOPS[::-1], batches, RUNTIME)}
    assert list(found) == STOPS  # in the order of execution
    for k, name in enumerate(STOPS):
        for value, run in zip(found[name], expected, strict=True):
            np.testing.assert_allclose(value, run[k], rtol=1e-6)


def test_the_rest_of_the_model_reads_replaced_values(model, batches):
    weight = numpy_helper.to_array(model.graph.initializer[-1])
    for name, values in staged(model, STOPS, batches, RUNTIME):
        if name == "a":
            values[:] = [np.ones_like(v) for v in values]
        if name == "c":
            for value in values:
                np.testing.assert_allclose(value, np.ones_like(value) @ weight, rtol=1e-6)


def test_tensors_that_no_later_stage_reads_are_freed(model, batches):
    past = {}
    for name, values in staged(model, STOPS, batches, RUNTIME):
        alive = {n for n, refs in past.items() if any(ref() is not None for ref in refs)}
        assert alive == {"c": {"a"}, "e": set()}.get(name, set())
        past[name] = [weakref.ref(v) for v in values]
