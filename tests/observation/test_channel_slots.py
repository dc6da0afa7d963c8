"""Channels that share a scale: united by operators that preserve channels, fixed by others."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.config import Config
from rdoq_onnx.observation.channel_slots import find_chains

SHAPES = {"a": (4, 1, 1), "b": (4, 1, 1), "c": (4, 1, 1)}


def chains(between, shapes=SHAPES, **constants):
    """Return the chains of a network x → Conv → a → `between` → Conv → y."""
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 3, 6, 6] x) => (float[N, 5, H, W] y)
        {{ [first] a = Conv (x, w) {between} [second] y = Conv (c, v) }}""")
    weights = {"w": np.ones((4, 3, 1, 1), np.float32), "v": np.ones((5, 4, 1, 1), np.float32)} | constants
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    network = analyse(model, Config().selection)
    return find_chains(network, {"x": (3, 1, 1), "y": (5, 1, 1)} | shapes)


ZERO, SIX = np.array(0, np.float32), np.array(6, np.float32)
PRESERVED = {
    "a Relu": "b = Relu (a) c = Relu (b)",
    "a pool": "b = MaxPool <kernel_shape = [2, 2]> (a) c = AveragePool <kernel_shape = [2, 2]> (b)",
    "a Clip from 0": "b = Relu (a) c = Clip (b, zero, six)",
    "an Add": "b = Relu (a) c = Add (a, b)",
}
FIXED = {
    "a Sigmoid": "b = Sigmoid (a) c = Relu (b)",
    "a Clip from 6": "b = Relu (a) c = Clip (b, six, six)",
    "another domain": "b = Sin (a) c = Relu (b)",
}


@pytest.mark.parametrize("kind", PRESERVED)
def test_preserved_channels_share_a_slot(kind):
    found = chains(PRESERVED[kind], zero=ZERO, six=SIX)
    slots = found.slots["a"].tolist()
    assert len(set(slots)) == 4
    assert found.slots["b"].tolist() == found.slots["c"].tolist() == slots
    assert not set(slots) & found.fixed
    assert found.outputs["first"].tolist() == found.inputs["second"].tolist() == slots
    assert len({found.component[s] for s in slots}) == 1


@pytest.mark.parametrize("kind", FIXED)
def test_channels_that_must_keep_their_scale_are_fixed(kind):
    found = chains(FIXED[kind], zero=ZERO, six=SIX)
    assert set(found.slots["a"].tolist()) <= found.fixed
    assert set(found.slots["c"].tolist()) <= found.fixed


def test_inputs_and_outputs_are_fixed():
    found = chains("b = Relu (a) c = Relu (b)")
    assert {*found.slots["x"].tolist(), *found.slots["y"].tolist()} <= found.fixed


def test_a_ceiling_has_the_slots_of_its_channels():
    found = chains("b = Relu (a) [cap] c = Clip (b, zero, six)", zero=ZERO, six=SIX)
    assert list(found.clips) == ["cap"]
    assert found.clips["cap"].shape == (4, 1, 1)
    assert found.clips["cap"].ravel().tolist() == found.slots["c"].tolist()
