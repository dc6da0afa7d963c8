"""Nodes that compute with integers already are listed with the reason."""

from onnx import parser

from rdoq_onnx.analysis.skips import Skip, integer_kernels
from rdoq_onnx.model.graph import Graph


def test_integer_kernels_are_listed_in_order():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (uint8[2, 3] x, int8[3, 4] w) => (int32[2, 4] y)
        { [a] a = MatMulInteger (x, w) [b] b = Neg (a) [c] y = Abs (b) }""")
    reason = "it is quantized already, and stays as it is"
    assert list(integer_kernels(Graph(model))) == [Skip("a", "MatMulInteger", reason)]
