"""Memory of a session, in a process of its own."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.system.resident import resident_bytes


def product(inputs):
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[N, {inputs}] x) => (float[N, 64] y) {{ y = MatMul (x, w) }}'
    )
    weight = np.random.default_rng(0).standard_normal((inputs, 64), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return model, weight.nbytes


def test_memory_grows_with_the_weights():
    (small, _), (large, added) = product(4), product(200_000)
    sizes = [resident_bytes(model) for model in (small, large)]
    if None in sizes:
        pytest.skip("this system does not tell the memory of a process")
    assert sizes[1] - sizes[0] > 0.9 * added


def test_a_model_that_is_refused_has_none():
    model, _ = product(4)
    model.graph.node[0].op_type = "Unknown"
    assert resident_bytes(model) is None
