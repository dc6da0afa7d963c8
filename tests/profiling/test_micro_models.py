"""Slopes of layers alone: right for times that follow a law, and measured on graphs that run."""

import numpy as np
import onnx
import pytest

from rdoq_onnx.model.linear import Linear
from rdoq_onnx.profiling.micro_models import Slopes, channel_slopes
from rdoq_onnx.system.runtime import Runtime

RUNTIME = Runtime("cpu", 1)
PLAIN = (Linear("Conv", (32, 24, 3, 3), strides=(2, 2), dilations=(1, 1), pads=(1, 1, 1, 1)), (2, 24, 9, 9))
DEPTHWISE = (Linear("Conv", (48, 1, 3, 3), group=48, auto_pad="SAME_UPPER"), (1, 48, 5, 5))
MATRIX = (Linear("Gemm", (10, 40), trans_b=True), (1, 40))
ROWS = (Linear("MatMul", (40, 64)), (2, 7, 40))
LINE = (Linear("Conv", (16, 8, 3), strides=(2,), dilations=(1,), pads=(1, 1)), (1, 8, 20))
VOLUME = (Linear("Conv", (16, 8, 3, 3, 3), pads=(1,) * 6), (1, 8, 5, 5, 5))


@pytest.fixture
def laws(monkeypatch):
    """Let a kernel take `law(outputs, inputs)` seconds; returns the channels that were timed."""
    timed = []

    def use(law):
        def profiled(self, model, feeds, runs):
            weights = {t.name: tuple(t.dims) for t in model.graph.initializer}
            seconds = {}
            for node in model.graph.node:
                shape = weights[node.input[3]]
                channels = shape[:2] if node.op_type == "QLinearConv" else shape[::-1]
                timed.append(channels)
                seconds[f"{node.name}_token_{len(seconds)}"] = [9.0, law(*channels), law(*channels), law(*channels)]
            return seconds, model

        monkeypatch.setattr(Runtime, "profiled", profiled)
        return timed

    return use


@pytest.mark.parametrize(("linear", "data"), [PLAIN, ROWS])
def test_slopes_of_a_law(laws, linear, data):
    """t = (0.4 + 0.6 outputs / all)(0.8 + 0.2 inputs / all)."""
    outputs, inputs = linear.channels, linear.inputs // int(np.prod(linear.shape[2:]))
    laws(lambda o, i: (0.4 + 0.6 * o / outputs) * (0.8 + 0.2 * i / inputs))
    found = channel_slopes(linear, data, RUNTIME)
    assert (found.outputs, found.inputs) == pytest.approx((0.6, 0.2))


def test_channels_of_a_depthwise_layer_are_its_inputs(laws):
    timed = laws(lambda o, i: 1 + o / 48)
    assert channel_slopes(*DEPTHWISE, RUNTIME) == Slopes(pytest.approx(0.5), 0.0)
    assert timed == [(48, 1), (16, 1), (32, 1)], "multiples of 16, as removal leaves them"


def test_what_saves_nothing(laws):
    laws(lambda o, i: 2.0 - o / 64)  # the fewer, the slower
    assert channel_slopes(*PLAIN, RUNTIME) == Slopes(0.0, 0.0)
    grouped = Linear("Conv", (8, 4, 1, 1), group=2)
    assert channel_slopes(grouped, (1, 8, 4, 4), RUNTIME) == Slopes()
    assert channel_slopes(Linear("ConvTranspose", (8, 4, 1, 1)), (1, 8, 4, 4), RUNTIME) == Slopes()


@pytest.mark.parametrize(("linear", "data"), [PLAIN, DEPTHWISE, MATRIX, ROWS, LINE, VOLUME])
def test_models_run(monkeypatch, linear, data):
    seen = []
    profiled = Runtime.profiled
    monkeypatch.setattr(Runtime, "profiled", lambda *args: seen.append(args[1]) or profiled(*args))
    found = channel_slopes(linear, data, RUNTIME)
    assert all(0 <= slope <= 1 for slope in (found.outputs, found.inputs))
    (model,) = seen
    onnx.checker.check_model(model, full_check=True)
    assert {n.op_type for n in model.graph.node} == {"QLinearConv" if linear.op_type == "Conv" else "QLinearMatMul"}
