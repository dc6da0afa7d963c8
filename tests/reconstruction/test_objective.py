"""The loss is the run's metric, and the error of tensors inside."""

import numpy as np
import pytest
from onnx import parser

from rdoq_onnx.observation.distortion import Metric, Rows
from rdoq_onnx.observation.parts import Part, Piece
from rdoq_onnx.reconstruction.objective import LOSS, Objective, target
from tests.cases import RUNTIME

TEXT = "g (float[4, 5] x) => (float[4, 5] y) { a = Relu(x) y = Tanh(a) }"


def metric(name="mse"):
    part = Part("y", (Piece("y", "y", "y", "whole"),))
    rows = Rows((-1,), (5**0.5,), 0.7)
    return Metric((part,), (1.3,), (5,), 0.4, False, rows, name)


def loss(objective):
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {TEXT}')
    rng = np.random.default_rng(0)
    x, y, a = (rng.standard_normal((4, 5)).astype(np.float32) for _ in range(3))
    graph = objective.appended(model, {"y": (4, 5), "a": (4, 5)}, 4)
    feeds = {target("y"): y, target("a"): a}
    feeds = {name: value for name, value in feeds.items() if name in {i.name for i in graph.graph.input}}
    (found,) = RUNTIME.session(graph).run({"x": x, **feeds}, [LOSS])
    return float(found[0]), np.tanh(np.maximum(x, 0)), y, np.maximum(x, 0), a


@pytest.mark.parametrize("name", ["mse", "kl"])
def test_the_loss_is_the_distortion_over_the_signal(name):
    found, value, y, _, _ = loss(Objective(metric(name), {}, 1.0))
    expected = metric(name).errors([value], [y], 4).mean() / metric(name).signal
    assert found == pytest.approx(expected, rel=1e-5)


def test_tensors_inside_count_by_their_power():
    alone = loss(Objective(metric(), {}, 3.0))[0]
    found, _, _, value, a = loss(Objective(metric(), {"a": 2.0}, 3.0))
    assert found - alone == pytest.approx(3.0 * np.square(value - a).mean() / 2.0, rel=1e-5)


def test_a_tensor_that_does_not_count_has_no_target():
    uncounted = Metric(metric().parts, (0.0,), (5,), 0.4)
    assert Objective(uncounted, {"a": 1.0}, 1.0).tensors == ["a"]
