"""What distortion is measured of: the outputs, logits in place of what saturates, floats in front of a cast."""

import numpy as np

from rdoq_onnx.observation.measured_outputs import targets
from tests.observation.test_observe import network


def test_outputs_that_saturate_are_measured_in_front_but_for_maps():
    image, kernel = "(float[N, 2, 4, 4] x) => (float[N, 3, 4, 4] y)", (3, 2, 1, 1)
    cases = {
        "z": network("z = MatMul (x, w) y = Sigmoid (z)"),
        "s": network("s = MatMul (x, w) p = Softmax (s) y = Identity (p)"),
        "y": network("c = Conv (x, w) b = Add (c, one) y = Sigmoid (b)", image, kernel, one=np.ones(1, np.float32)),
    }
    for target, net in cases.items():
        assert targets(net.model) == [target]
    softmax = network("c = Conv (x, w) y = Softmax <axis = 1> (c)", image, kernel)
    assert targets(softmax.model) == ["c"]
