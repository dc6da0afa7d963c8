"""Skips with reasons: integer nodes, nodes excluded by pattern or type, unfit weights."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.analysis.skips import (
    Excludes,
    Refusal,
    Skip,
    check_excludes,
    integer_kernels,
    not_a_matrix,
    not_finite,
    unmatched,
)
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.graph import Graph

NODES = [("Conv", ("/0/Conv", "w0")), ("Conv", ("/1/Conv", "w1")), ("Gemm", ("/2/Gemm", "w2"))]


@pytest.mark.parametrize(
    ("patterns", "types", "reasons"),
    [
        ((), (), [None, None, None]),
        (("w0",), (), ["excluded by --exclude", None, None]),
        (("/[01]/.*",), (), ["excluded by --exclude", "excluded by --exclude", None]),
        ((".*1",), ("Gemm",), [None, "excluded by --exclude", "excluded by --exclude-op"]),
        (("w2",), ("Gemm",), [None, None, "excluded by --exclude-op"]),
    ],
)
def test_excluded_by_name_pattern_or_type(patterns, types, reasons):
    excludes = Excludes(patterns, types)
    refusals = [excludes.refusal(*node) for node in NODES]
    assert refusals == [None if reason is None else Refusal(reason) for reason in reasons]
    assert unmatched(excludes, NODES) == Excludes((), ())
    check_excludes(excludes, NODES)


def test_an_option_that_matches_nothing_is_refused_with_the_nearest_name():
    excludes = Excludes(("w0", "w9"), ("Conv", "Gem"))
    assert unmatched(excludes, NODES) == Excludes(("w9",), ("Gem",))
    with pytest.raises(ConfigError, match=r"--exclude 'w9' matches no layer; the nearest is 'w\d'"):
        check_excludes(excludes, NODES)
    with pytest.raises(ConfigError, match="--exclude-op 'Gem' matches no layer's operator type; the nearest is 'Gemm'"):
        check_excludes(Excludes((), ("Gem",)), NODES)
    with pytest.raises(ConfigError, match=r"--exclude 'x' matches no layer$"):
        check_excludes(Excludes(("x",), ()), [])


def test_a_weight_is_a_finite_float_matrix():
    def tensor(value):
        return numpy_helper.from_array(value, "w")

    matrix = np.ones((2, 3), np.float32)
    assert not_a_matrix(tensor(matrix)) is None
    assert "1 dimensions" in not_a_matrix(tensor(matrix[0])).reason
    assert "INT64, not FLOAT" in not_a_matrix(tensor(matrix.astype(np.int64))).reason
    assert not_finite(tensor(matrix)) is None
    assert "NaN or infinity" in not_finite(tensor(matrix * np.inf)).reason


def test_integer_kernels_are_listed_in_order():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (uint8[2, 3] x, int8[3, 4] w) => (int32[2, 4] y)
        { [a] a = MatMulInteger (x, w) [b] b = Neg (a) [c] y = Abs (b) }""")
    reason = "it is already quantized, and stays as it is"
    assert list(integer_kernels(Graph(model))) == [Skip("a", "MatMulInteger", reason)]
