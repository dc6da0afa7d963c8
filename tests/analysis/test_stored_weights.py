"""Weights that no product unfolds: found, searched, stored as integers, or left in float with a reason."""

import json

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper, parser

import rdoq_onnx
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.network import Network
from rdoq_onnx.analysis.normalization import NORMALIZE
from rdoq_onnx.candidates.quantizer import quantize_rows
from rdoq_onnx.config import Config
from rdoq_onnx.emission.quantized_model import stored_weight
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.estimate.dry_run import dry_run, lines
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.model.protos import all_nodes
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.quantize_stored import QuantizeStored, StoredWeight
from rdoq_onnx.system import openvino_runtime
from tests.conftest import ZOO, OrtRun, deviation

SHAPES = {
    "w": (16, 16),
    "table": (300, 16),
    "rw": (2, 32, 16),
    "rr": (2, 32, 32),
    "lw": (64, 16),
    "lr": (64, 16),
    "gw": (1, 48, 16),
    "gr": (1, 48, 16),
    "s": (3, 16, 12),
    "left": (3, 12, 16),
    "k": (24, 16, 1),
    "tr": (16, 24, 1),
    "g": (24, 16),
    "m": (16, 24),
    "tiny": (16, 4),
}
RNG = np.random.default_rng(0)
WEIGHTS: dict[str, NDArray[np.generic]] = {n: RNG.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
WEIGHTS |= {
    "zero": np.array([0]),
    "one": np.array([1]),
    "half": np.array([32]),
    "end": np.array([99]),
    "last": np.array([-1]),
    "q": np.ones((16, 16), np.int8),
    "scale": np.array(0.1, np.float32),
    "nan": np.full((16, 24), np.nan, np.float32),
    "trips": np.array(2),
    "yes": np.array(True),
    "vector": np.ones(16, np.float32),
}


def branch(nodes: str) -> str:
    """`nodes`, which make t [N, 16], in the body of an If."""
    return f"""[branch] b = If (c) <then_branch = g1 () => (float[N, 16] t) {{ {nodes} }},
        else_branch = g2 () => (float[N, 16] e) {{ e = Relu (x) }}>"""


def added(tensor: str, result: str = "t", to: str = "x") -> str:
    """A tensor of any shape, as its mean, in what is added up to the output."""
    return f"v = ReduceMean ({tensor}) r = Reshape (v, one) {result} = Add ({to}, r)"


# W of an LSTM as PyTorch keeps it, its gates in another order: put right at each run.
PYTORCH = """f = Slice (lw, zero, half, zero) l = Slice (lw, half, end, zero) fl = Concat <axis = 0> (l, f)
    u = Unsqueeze (x, zero) wi = Unsqueeze (fl, zero) ri = Unsqueeze (lr, zero)
    h, p = LSTM <hidden_size = 16> (u, wi, ri) t = Squeeze (p, zero)"""
FOUND = {  # nodes, which make b [N, 16]: operator, weight, and axes that have scales of their own
    "e = Gather (table, i) b = ReduceMean <axes = [1], keepdims = 0> (e)": {("Gather", "table", (0,))},
    'u = Unsqueeze (x, zero) h = RNN <hidden_size = 32, direction = "bidirectional"> (u, rw, rr) ' + added("h", "b"): {
        ("RNN", "rw", (0, 1)),
        ("RNN", "rr", (0, 1)),
    },
    "u = Unsqueeze (x, zero) h, p = GRU <hidden_size = 16> (u, gw, gr) b = Squeeze (p, zero)": {
        ("GRU", "gw", (0, 1)),
        ("GRU", "gr", (0, 1)),
    },
    "d = MatMul (x, s) " + added("d", "b"): {("MatMul", "s", (2,))},
    "f = Transpose (x) d = MatMul (left, f) " + added("d", "b"): {("MatMul", "left", (1,))},
    branch(PYTORCH): {("LSTM", "lw", (0,)), ("LSTM", "lr", (0,))},
    branch("u = Unsqueeze (x, last) d = Conv (u, k) " + added("d")): {("Conv", "k", (0,))},
    branch("u = Unsqueeze (x, last) d = ConvTranspose (u, tr) " + added("d")): {("ConvTranspose", "tr", (1,))},
    branch("d = Gemm <transB = 1> (x, g) " + added("d")): {("Gemm", "g", (0,))},
    branch("e = Gather (table, i) t = ReduceMean <axes = [1], keepdims = 0> (e)"): {("Gather", "table", (0,))},
    "[branch] b = Loop (trips, yes, x) <body = g1 (int64 k1, bool go, float[N, 16] x0) => (bool on, float[N, 16] t) {"
    "on = Identity (go) d = MatMul (x0, m) " + added("d", to="x0") + "}>": {("MatMul", "m", (1,))},
    "[branch] last_x, b = Scan <num_scan_inputs = 1, body = g1 (float[16] x0, float[16] row) =>"
    "(float[16] x1, float[16] t) { x1 = Identity (x0) d = MatMul (row, m) " + added("d", to="row") + "}> (vector, x)": {
        ("MatMul", "m", (1,))
    },
}
LEFT = {  # nodes: why they stay in float
    "e = DequantizeLinear (q, scale) b = MatMul (x, e)": "its weight comes from a DequantizeLinear",
    branch("d = DequantizeLinear (q, scale) t = MatMul (x, d)"): "its weight comes from a DequantizeLinear",
    branch("n = Neg (m) d = MatMul (x, n) " + added("d")): "'n' comes from a Neg; if that is constant, fold constants",
    branch("d = MatMul (x, tiny) " + added("d")): "so small (64 elements)",
    branch("d = MatMul (x, nan) " + added("d")): "its weight holds NaN or infinity",
    branch("d = MatMul (x, m) n = Neg (m) p = Concat <axis = 0> (d, n) " + added("p")): "'m' also feeds Neg 'n'",
    branch("f = Transpose (x) d = MatMul (x, f) " + added("d")): "it is computed, so there is no weight",
}


def model(nodes: str) -> onnx.ModelProto:
    """y [N, 16] is x w and what `nodes` make of x, i and c; those of these that they read are inputs."""
    inputs = {"i": "int64[N, 3] i", "c": "bool c"}
    words = set(nodes.replace("(", " ").replace(")", " ").replace(",", " ").split())
    given = ", ".join(["float[N, 16] x", *(v for k, v in inputs.items() if k in words)])
    parsed = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
        g ({given}) => (float[N, 16] y) {{ {nodes} z = MatMul (x, w) y = Add (z, b) }}""")
    parsed.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in WEIGHTS.items() if k in words | {"w"})
    return parsed


def found(nodes: str, config: Config | None = None) -> Network:
    return analyse(run_passes(NORMALIZE, model(nodes)), (config or Config()).selection)


def feeds(proto: onnx.ModelProto, count: int = 5) -> dict[str, NDArray[np.generic]]:
    rng = np.random.default_rng(1)
    every = {
        "x": rng.standard_normal((count, 16)).astype(np.float32),
        "i": rng.integers(0, 300, (count, 3)),
        "c": np.array(True),
    }
    return {i.name: every[i.name] for i in proto.graph.input}


def rounded(layer: Layer, value: NDArray[np.float32], bits: int = 8) -> StoredWeight:
    return stored_weight(layer, quantize_rows(layer.linear.rows(value), bits, 127))


def stored(network: Network, bits: int = 8) -> onnx.ModelProto:
    """`network` with the weights that no product unfolds, and those alone, in integers."""
    tensors = {t.name: numpy_helper.to_array(t) for t in network.model.graph.initializer}
    weights = [rounded(x, tensors[x.weight], bits) for x in network.stored]
    return run_passes([QuantizeStored(weights)], network.model)


def nodes_of(layer: Layer) -> tuple[str, ...]:
    return tuple(u.node for u in layer.uses)


@pytest.mark.parametrize("nodes", FOUND)
def test_what_is_found_is_stored_in_integers(nodes: str, ort_run: OrtRun) -> None:
    network = found(nodes)
    assert {(x.linear.op_type, x.weight, x.linear.axes) for x in network.stored} == FOUND[nodes]
    assert [layer.weight for layer in network.layers] == ["w"]
    assert network.skipped == ()
    result = stored(network)
    kinds = {t.name: t.data_type for t in result.graph.initializer if len(t.dims) > 1}
    for layer in network.stored:
        assert layer.weight not in kinds
        assert kinds[f"{layer.weight}_quantized"] == TensorProto.INT8
    proto = model(nodes)
    assert 0 < deviation(ort_run(result, feeds(proto)), ort_run(proto, feeds(proto))) < 0.01


@pytest.mark.parametrize("nodes", LEFT)
def test_what_stays_in_float_says_why(nodes: str) -> None:
    network = found(nodes)
    assert network.stored == ()
    (skip,) = network.skipped
    assert skip.node
    assert LEFT[nodes] in skip.reason


def test_rows_of_a_table_are_off_by_what_rounding_costs(ort_run: OrtRun) -> None:
    """Even if rows differ a thousandfold; and the table is not decoded whole, though ONNX Runtime folds constants."""
    table = WEIGHTS["table"] * np.geomspace(1e-3, 1e3, 300, dtype=np.float32)[:, None]
    text = '<ir_version: 8, opset_import: ["": 17]> g (int64[N] i) => (float[N, 16] e) { e = Gather (table, i) }'
    proto = parser.parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(table, "table"))
    network = found(next(iter(FOUND)))
    (rows,) = network.stored
    result = run_passes([QuantizeStored([rounded(rows, table)])], proto)
    assert [n.op_type for n in result.graph.node] == ["Gather", "Cast", "Gather", "Mul"]
    (e,) = ort_run(result, {"i": np.arange(300) - 300})
    steps = np.abs(table).max(axis=1, keepdims=True) / 127
    noise = np.sqrt(np.square(e - table).mean(axis=1, keepdims=True))
    assert (noise <= 1.2 * steps / np.sqrt(12)).all()


def test_a_table_that_is_also_a_layer_s_weight(ort_run: OrtRun) -> None:
    """The layer's integers are its own, too; one in a body decodes all rows, which the Gather then reads."""
    tied = "e = Gather (table, i) s1 = ReduceMean (e) f = Gemm <transB = 1> (x, table) s2 = ReduceMean (f) "
    tied += "s3 = Add (s1, s2) r3 = Reshape (s3, one) b = Add (x, r3)"
    network = found(tied)
    assert [layer.weight for layer in network.layers] == ["table", "w"]
    assert network.stored == ()
    assert [(nodes_of(tie.table), tie.layer) for tie in network.ties] == [(("Gather_0",), "Gemm_0")]
    both = "a = Gather (table, i) b0 = ReduceMean <axes = [1], keepdims = 0> (a) "
    both += branch("d = Gemm <transB = 1> (b0, table) " + added("d"))
    network = found(both)
    assert [(x.linear.op_type, nodes_of(x)) for x in network.stored] == [("Gather", ("Gather_0", "d"))]
    assert not network.stored[0].looked_up
    result = stored(network)
    assert sum(n.op_type == "Gather" for n in all_nodes(result.graph)) == 1
    proto = model(both)
    assert 0 < deviation(ort_run(result, feeds(proto)), ort_run(proto, feeds(proto))) < 0.01


def test_branches_with_different_weights_of_one_name(ort_run: OrtRun) -> None:
    nodes = branch("d = MatMul (x, m) " + added("d"))
    proto = model(nodes)
    (conditional,) = [n for n in proto.graph.node if n.op_type == "If"]
    for attribute, factor in zip(conditional.attribute, (1, -2), strict=True):
        body = attribute.g
        body.ClearField("node")
        body.node.extend(parser.parse_graph("g () => (float[N, 16] o) { o = MatMul (x, inner) }").node)
        body.node[0].output[0] = body.output[0].name
        body.initializer.append(numpy_helper.from_array(factor * WEIGHTS["w"], "inner"))
    network = analyse(run_passes(NORMALIZE, proto), Config().selection)
    assert len({x.weight for x in network.stored}) == 2
    for c in (True, False):
        given = feeds(proto) | {"c": np.array(c)}
        assert 0 < deviation(ort_run(stored(network), given), ort_run(proto, given)) < 0.01


def test_options() -> None:
    gather = next(iter(FOUND))
    for config in (Config(exclude=("table",)), Config(exclude=("Gather_.",)), Config(exclude_ops=("Gather",))):
        (skip,) = found(gather, config).skipped
        assert skip.reason.startswith("excluded by --exclude")
    (skip,) = found(gather, Config(target="tensorrt")).skipped
    assert "--target tensorrt" in skip.reason
    with pytest.raises(ConfigError, match=r"--exclude 'tabel' matches no layer; the nearest is 'table'"):
        found(gather, Config(exclude=("tabel",)))
    with pytest.raises(ConfigError, match=r"--pin table\[300:301\]=4: 'Gather_0' has no such channels"):
        found(gather, Config(pins=(("table[300:301]", 4),)))


@pytest.mark.parametrize("nodes", FOUND)
def test_the_search_covers_them(nodes: str) -> None:
    """Each takes the width that it is pinned to, and costs about what its curve promises."""
    proto = model(nodes)
    given, weights = feeds(proto, 60), {weight for _, weight, _ in FOUND[nodes]}
    measured = {}
    for bits in (3, 5):
        pins = (("w", 8), *((name, bits) for name in sorted(weights)))
        options = {"weights_only": True, "weight_bits": 8, "effort": "fast", "threads": 1, "pins": pins}
        result = rdoq_onnx.quantize(proto, given, **options)
        widths = dict(
            zip((x.weight for x in result.curves.network.searched), result.allocation.layer_bits, strict=True)
        )
        assert {name for name, each in widths.items() if (each == bits).all()} == weights
        assert result.report.measured < 4 * result.report.predicted
        measured[bits] = result.report.measured
    assert measured[5] < measured[3]


@pytest.mark.parametrize(
    ("storage", "target"), [("packed", "onnxruntime"), ("native", "openvino"), ("int8", "openvino")]
)
def test_a_run_reports_them(storage: str, target: str) -> None:
    proto = model(next(iter(FOUND)))
    options = {"pins": (("table", 4),), "storage": storage, "target": target}
    result = rdoq_onnx.quantize(proto, feeds(proto, 40), effort="fast", threads=1, weight_bits=8, **options)
    document = json.loads(result.report.to_json())
    (entry,) = [x for x in document["layers"] if x["op"] == "Gather"]
    assert entry["name"] == "Gather_0"
    assert entry["bits"] == [4] * 300
    assert entry["activation_bits"] is None
    (table,) = entry["tables"]
    assert (table["name"], table["rows"]) == ("Gather_0", 300)
    assert 0 < table["seen"] <= len(np.unique(feeds(proto, 40)["i"]))
    assert (
        "  Gather_0",
        f"{table['seen']} of 300 rows seen in calibration; the others by the mean effect of these",
    ) in (result.report.rows())
    assert document["weights"]["elements"] == 256 + 4800
    assert result.report.skipped == ()
    assert result.report.sqnr_db > 15
    assert storage == "int8" or result.report.output_bytes < 4800 * 4 / 8 + 300 * 4 + 4500


def test_rows_that_are_read_most_get_most_bits() -> None:
    """Rows 0 to 9 are in many samples, 100 to 199 in one each; the rest is never seen, and gets no more than these."""
    proto = model(next(iter(FOUND)))
    given = feeds(proto, 100)
    given["i"] = np.stack([np.arange(100) % 10, (np.arange(100) + 5) % 10, np.arange(100) + 100], axis=1)
    result = rdoq_onnx.quantize(proto, given, effort="fast", threads=1, weights_only=True, weight_bits=4)
    (bits,) = [x for x in result.allocation.layer_bits if len(x) == 300]
    often, seldom, never = bits[:10].mean(), bits[100:200].mean(), bits[200:].mean()
    assert often > seldom + 1
    assert seldom >= never > 0


@pytest.mark.skipif(not openvino_runtime.installed(), reason="OpenVINO is not installed")
@pytest.mark.parametrize(("held", "kept"), [("GRU", 2), ("ConvTranspose", 1), ("Scan", 0)])
def test_openvino_takes_them(held: str, kept: int) -> None:
    """Its GRU requires constant weights; the body of its Scan reads no computed tensor from outside."""
    nodes, given = next(n for n in FOUND if f" {held} " in n), {"weight_bits": 8, "target": "openvino"}
    result = rdoq_onnx.quantize(model(nodes), feeds(model(nodes), 40), effort="fast", threads=1, **given)
    assert len(result.curves.network.stored) == kept
    assert ["--target openvino" in s.reason for s in result.report.skipped] == [True] * (kept == 0)
    assert result.report.sqnr_db > 25


LAYERLESS = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 16] x) => (float[N, 16] y) {
    u = Unsqueeze (x, zero) h, p = GRU <hidden_size = 16> (u, gw, gr) y = Squeeze (p, zero) }"""


def layerless() -> onnx.ModelProto:
    proto = parser.parse_model(LAYERLESS)
    proto.graph.initializer.extend(numpy_helper.from_array(WEIGHTS[k], k) for k in ("gw", "gr", "zero"))
    return proto


def test_a_model_without_layers() -> None:
    decibels = {}
    for bits in (3, 6):
        result = rdoq_onnx.quantize(layerless(), feeds(layerless(), 40), weight_bits=bits, threads=1, effort="fast")
        report = json.loads(result.report.to_json())
        assert report["bits"] == {"weights": pytest.approx(bits, abs=0.02), "activations": None}
        assert [(x["name"], x["op"]) for x in report["layers"]] == [("gw", "GRU"), ("gr", "GRU")]
        decibels[bits] = result.report.sqnr_db
    assert decibels[6] > decibels[3] + 12
    found = rdoq_onnx.quantize(layerless(), feeds(layerless(), 80), sqnr=20.0, threads=1, effort="fast")
    assert found.report.sqnr_db > 20


def test_options_that_leave_nothing_to_do() -> None:
    with pytest.raises(rdoq_onnx.RdoqError, match="no layer to"):
        rdoq_onnx.quantize(layerless(), feeds(layerless(), 40), threads=1, exclude_ops=("GRU",))


def test_a_dry_run_lists_them() -> None:
    found = dry_run(layerless(), feeds(layerless(), 40), Config(threads=1))
    assert any(line.startswith("  --pin gw=8  # GRU, 48 channels, 768 weights, 1x48x16") for line in lines(found))


@pytest.mark.skipif(not ZOO.exists(), reason="the zoo is not there")
def test_silero_whose_layers_are_all_in_branches() -> None:
    x = np.random.default_rng(0).standard_normal((16, 576)).astype(np.float32) * np.geomspace(1e-3, 1, 16)[:, None]
    samples = {"input": x.astype(np.float32), "state": np.zeros((2, 1, 128), np.float32), "sr": np.array(16000)}
    result = rdoq_onnx.quantize(ZOO / "silero_vad" / "model.onnx", samples, threads=1, weight_bits=8)
    assert all("a vector that it reads" in s.reason for s in result.report.skipped)  # biases
    assert {x.op for x in result.report.layers} == {"Conv", "LSTM"}
    assert result.report.output_bytes < 0.31 * result.report.input_bytes
    assert result.report.sqnr_db > 20
