"""Tables that are also a layer's weight share its integers, unless that layer stays in float."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper, parser

import rdoq_onnx
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import NORMALIZE
from rdoq_onnx.analysis.skips import presumed_finite
from rdoq_onnx.analysis.ties import untied
from rdoq_onnx.config import Config
from rdoq_onnx.passes import run_passes

ROWS = np.random.default_rng(0).standard_normal((200, 16), np.float32) / 4


def model(head: str = "MatMul (t, w)", weight: np.ndarray = ROWS.T, table: str = "table") -> ModelProto:
    """Rows of a table [200, 16], a layer, and a head that tells rows apart."""
    proto = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]> g (int64[N, 3] i) => (float[N, 3, 200] y) {{
        e = Gather ({table}, i) h = MatMul (e, a) t = Tanh (h) y = {head} }}""")
    square = np.random.default_rng(1).standard_normal((16, 16), np.float32) / 4
    tensors = {"table": ROWS, "w": np.ascontiguousarray(weight), "a": square}
    proto.graph.initializer.extend(
        numpy_helper.from_array(v, k) for k, v in tensors.items() if k in str(proto.graph.node)
    )
    return proto


def ties(proto: ModelProto, **options: object) -> list[tuple[str, str]]:
    network = analyse(run_passes(NORMALIZE, proto), Config(**options).selection)  # type: ignore[arg-type]
    return [(tie.table.weight, tie.layer) for tie in network.ties]


def test_equal_rows_are_tied_whichever_way_they_lie() -> None:
    assert ties(model()) == [("table", "MatMul_1")]
    assert ties(model(weight=ROWS.T * np.float32(1.001))) == []
    shared = "MatMul (t, u) u = Transpose <perm = [1, 0]> (table)"
    proto = model()
    proto.graph.node[3].input[1] = "u"
    proto.graph.node.insert(0, parser.parse_graph("g () => () { u = Transpose <perm = [1, 0]> (table) }").node[0])
    assert [table for table, _ in ties(proto)] == ["table"], shared


def test_an_excluded_head_leaves_the_table_alone() -> None:
    assert ties(model(), exclude=("w",)) == []
    network = analyse(run_passes(NORMALIZE, model()), Config().selection)
    left = untied(replace(network, layers=network.layers[:1]))
    assert [x.weight for x in left.stored] == ["table"]
    assert left.ties == ()
    assert untied(network) == network


def test_a_dry_run_reads_no_weights_to_find_them() -> None:
    network = analyse(run_passes(NORMALIZE, model()), Config().selection, presumed_finite)
    assert network.ties == ()
    assert [x.weight for x in network.stored] == ["table"]


@pytest.mark.parametrize("options", [{"weights_only": True}, {"activation_bits": 8}])
def test_tied_rows_are_stored_and_counted_once(options: dict[str, object]) -> None:
    given = {"i": np.random.default_rng(2).integers(0, 200, (80, 3))}
    tied, apart = (
        rdoq_onnx.quantize(m, given, weight_bits=6, effort="fast", threads=1, **options)
        for m in (model(), model(weight=ROWS.T * np.float32(1.001)))
    )
    assert tied.report.weight_elements == 200 * 16 + 256
    assert apart.report.weight_elements == 2 * 200 * 16 + 256
    assert apart.report.output_bytes - tied.report.output_bytes > 0.7 * 200 * 16 * 6 / 8
    assert [t.name for layer in tied.report.layers for t in layer.tables] == ["Gather_0"]
    assert tied.report.sqnr_db > 28
    pinned = rdoq_onnx.quantize(
        model(), given, effort="fast", threads=1, pins=(("table", 3),), weight_bits=8, **options
    )
    assert set(pinned.allocation.layer_bits[1]) == {3}
