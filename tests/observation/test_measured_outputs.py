"""Measured tensors: outputs, logits in place of saturating outputs, floats in front of a Cast."""

import numpy as np
import pytest
from onnx import parser

from rdoq_onnx.observation.measured_outputs import measured_outputs
from tests.observation.test_observe import network


def test_logits_of_saturating_outputs_are_measured_except_for_maps():
    image, kernel = "(float[N, 2, 4, 4] x) => (float[N, 3, 4, 4] y)", (3, 2, 1, 1)
    cases = {
        "z": network("z = MatMul (x, w) y = Sigmoid (z)"),
        "s": network("s = MatMul (x, w) p = Softmax (s) y = Identity (p)"),
        "y": network("c = Conv (x, w) b = Add (c, one) y = Sigmoid (b)", image, kernel, one=np.ones(1, np.float32)),
    }
    for target, net in cases.items():
        assert measured_outputs(net.model) == [target]
    softmax = network("c = Conv (x, w) y = Softmax <axis = 1> (c)", image, kernel)
    assert measured_outputs(softmax.model) == ["c"]


@pytest.mark.parametrize(("nodes", "expected"), [
    ("z = Neg (x) y = Softmax (z)", ["z"]),
    ("z = Neg (x) s = Sigmoid (z) y = Transpose (s)", ["z"]),
    ("z = Neg (x) s = Softmax (z) y = Neg (s)", ["y"]),  # its output is processed further
    ("z = Neg (x) y = Cast <to = 10> (z)", ["z"]),
    ("z = Neg (x) y = Cast <to = 7> (z)", ["y"]),
    ("z = Neg (x) s = Softmax (z) y = Cast <to = 10> (s)", ["z"]),
])  # fmt: skip
def test_what_is_measured_of_an_output(nodes, expected):
    model = parser.parse_model(f'''<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 4] x) => (float[N, M] y) {{ {nodes} }}''')
    assert measured_outputs(model) == expected


def test_logits_of_two_outputs_are_measured_once():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 4] x) => (float[N, 4] p, float[N, 4] z) { z = Neg (x) p = Softmax (z) }""")
    assert measured_outputs(model) == ["z"]
