"""Relus whose mask moves behind the MaxPool or Concat that follows."""

import pytest
from onnx import parser

from rdoq_onnx.gradients.relu_masks import masked_tensors
from rdoq_onnx.model.graph import Graph

POOL = "MaxPool <kernel_shape = [2, 2]>"
CASES = {
    f"a = Relu (x) p = {POOL} (a) y = Sin (p)": {"a"},
    f"a = Relu (x) b = Relu (x) c = Concat <axis = 1> (a, b) p = {POOL} (c) y = Sin (p)": {"a", "b", "c"},
    f"a = Relu (x) b = Sin (x) c = Concat <axis = 1> (a, b) p = {POOL} (c) y = Sin (p)": set(),
    f"a = Relu (x) p = {POOL} (a) y = Add (p, a)": set(),  # the Add is a second consumer of a
    f"a = Sin (x) y = {POOL} (a)": set(),
    "a = Relu (x) p = AveragePool <kernel_shape = [2, 2]> (a) y = Sin (p)": set(),
    f"a = Relu (x) y = {POOL} (a)": {"a"},
}


@pytest.mark.parametrize("nodes", CASES)
def test_relus_whose_sole_consumer_is_a_pool_or_concat(nodes):
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[1, 2, 4, 4] x) => (float[1, M, H, W] y) {{ {nodes} }}""")
    assert masked_tensors(Graph(model)) == CASES[nodes]
