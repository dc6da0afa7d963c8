"""Weights that the search does not cover: found, stored in 8 bits, or left in float with a reason."""

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
from rdoq_onnx.analysis.weight_only import widths
from rdoq_onnx.config import Config
from rdoq_onnx.dry_run import dry_run, lines
from rdoq_onnx.emission.weight_only import stored_weight
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.protos import all_nodes
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.quantize_stored import QuantizeStored
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


def stored(network: Network, bits: int = 8) -> onnx.ModelProto:
    """`network` with the weights that are not searched, and those alone, in integers."""
    tensors = {t.name: numpy_helper.to_array(t) for t in network.model.graph.initializer}
    weights = [stored_weight(w, bits, tensors[w.tensor]) for w in network.weight_only]
    return run_passes([QuantizeStored(weights)], network.model)


@pytest.mark.parametrize("nodes", FOUND)
def test_what_is_found_is_stored_in_integers(nodes: str, ort_run: OrtRun) -> None:
    network = found(nodes)
    assert {(w.op_type, w.tensor, w.axes) for w in network.weight_only} == FOUND[nodes]
    assert [layer.weight for layer in network.layers] == ["w"]
    assert network.skipped == ()
    result = stored(network)
    kinds = {t.name: t.data_type for t in result.graph.initializer if len(t.dims) > 1}
    for weights in network.weight_only:
        assert weights.tensor not in kinds
        assert kinds[f"{weights.tensor}_quantized"] == TensorProto.INT8
    proto = model(nodes)
    assert 0 < deviation(ort_run(result, feeds(proto)), ort_run(proto, feeds(proto))) < 0.01


@pytest.mark.parametrize("nodes", LEFT)
def test_what_stays_in_float_says_why(nodes: str) -> None:
    network = found(nodes)
    assert network.weight_only == ()
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
    (rows,) = network.weight_only
    result = run_passes([QuantizeStored([stored_weight(rows, 8, table)])], proto)
    assert [n.op_type for n in result.graph.node] == ["Gather", "Cast", "Gather", "Mul"]
    (e,) = ort_run(result, {"i": np.arange(300) - 300})
    steps = np.abs(table).max(axis=1, keepdims=True) / 127
    noise = np.sqrt(np.square(e - table).mean(axis=1, keepdims=True))
    assert (noise <= 1.2 * steps / np.sqrt(12)).all()


def test_a_table_that_is_also_a_layer_s_weight(ort_run: OrtRun) -> None:
    """A searched layer has its own integers; one in a body decodes all rows, which the Gather then reads."""
    tied = "e = Gather (table, i) s1 = ReduceMean (e) f = Gemm <transB = 1> (x, table) s2 = ReduceMean (f) "
    tied += "s3 = Add (s1, s2) r3 = Reshape (s3, one) b = Add (x, r3)"
    network = found(tied)
    assert [layer.weight for layer in network.layers] == ["table", "w"]
    assert [w.nodes for w in network.weight_only] == [("Gather_0",)]
    both = "a = Gather (table, i) b0 = ReduceMean <axes = [1], keepdims = 0> (a) "
    both += branch("d = Gemm <transB = 1> (b0, table) " + added("d"))
    network = found(both)
    assert [(w.op_type, w.nodes) for w in network.weight_only] == [("Gather", ("Gather_0", "d"))]
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
    assert len({w.tensor for w in network.weight_only}) == 2
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
    network = found(gather, Config(pins=(("tab.*", 4),)))
    assert widths(network.weight_only, (("tab.*", 5), ("Gather_0", 4))) == (4,)
    integers = next(t for t in stored(network, 4).graph.initializer if t.name == "table_quantized")
    assert np.ptp(numpy_helper.to_array(integers).astype(int), axis=1).max() < 16
    with pytest.raises(ConfigError, match=r"--pin table=1: .*give 2 to 8 bits"):
        widths(network.weight_only, (("table", 1),))


@pytest.mark.parametrize("options", [{}, {"pins": (("table", 4),), "target": "openvino"}, {"storage": "int8"}])
def test_a_run_reports_them(options: dict[str, object]) -> None:
    proto = model(next(iter(FOUND)))
    result = rdoq_onnx.quantize(proto, feeds(proto, 40), effort="fast", threads=1, **options)
    (entry,) = json.loads(result.report.to_json())["weight_only"]
    bits = 4 if "pins" in options else 8
    assert entry == {
        "name": "Gather_0",
        "op": "Gather",
        "weight": "table",
        "elements": 4800,
        "bits": bits,
        "reason": "its rows are looked up",
    }
    assert result.report.skipped == ()
    rows = result.report.rows()
    assert ("weights outside the budget", "4,800 in 1 tensors") in rows
    assert ("their tensors by bits", f"{bits}: 1") in rows
    assert result.report.sqnr_db > (15 if bits == 4 else 25)
    assert result.report.weight_elements == 256
    assert result.report.output_bytes < 4 * 4800 * bits / 32 + 300 * 4 + 4000


@pytest.mark.skipif(not openvino_runtime.installed(), reason="OpenVINO is not installed")
@pytest.mark.parametrize(("held", "kept"), [("GRU", 2), ("ConvTranspose", 1), ("Scan", 0)])
def test_openvino_takes_them(held: str, kept: int) -> None:
    """Its GRU requires constant weights; the body of its Scan reads no computed tensor from outside."""
    nodes = next(n for n in FOUND if f" {held} " in n)
    result = rdoq_onnx.quantize(model(nodes), feeds(model(nodes), 40), effort="fast", threads=1, target="openvino")
    assert len(result.report.weight_only) == kept
    assert ["--target openvino" in s.reason for s in result.report.skipped] == [True] * (kept == 0)
    assert result.report.sqnr_db > 25


LAYERLESS = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 16] x) => (float[N, 16] y) {
    u = Unsqueeze (x, zero) h, p = GRU <hidden_size = 16> (u, gw, gr) y = Squeeze (p, zero) }"""


def layerless() -> onnx.ModelProto:
    proto = parser.parse_model(LAYERLESS)
    proto.graph.initializer.extend(numpy_helper.from_array(WEIGHTS[k], k) for k in ("gw", "gr", "zero"))
    return proto


def test_a_model_that_has_nothing_to_search() -> None:
    result = rdoq_onnx.quantize(layerless(), feeds(layerless(), 40), bits=3, threads=1)
    report = json.loads(result.report.to_json())
    assert report["bits"] == {"weights": None, "activations": None}
    assert [(x["weight"], x["bits"]) for x in report["weight_only"]] == [("gw", 8), ("gr", 8)]
    assert result.report.sqnr_db > 35
    assert result.report.output_bytes < result.report.input_bytes / 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sqnr": 30.0}, "--sqnr: the search covers none of the model's weights"),
        ({"exclude_ops": ("GRU",)}, "no layer to"),
    ],
)
def test_options_that_leave_nothing_to_do(options: dict[str, object], said: str) -> None:
    with pytest.raises(rdoq_onnx.RdoqError, match=said):
        rdoq_onnx.quantize(layerless(), feeds(layerless(), 40), threads=1, **options)


def test_a_dry_run_lists_them() -> None:
    found = dry_run(layerless(), feeds(layerless(), 40), Config(threads=1))
    assert any(line.startswith("  --pin gw=8  # GRU, 768 weights, 1x48x16") for line in lines(found))


@pytest.mark.skipif(not ZOO.exists(), reason="the zoo is not there")
def test_silero_whose_layers_are_all_in_branches() -> None:
    x = np.random.default_rng(0).standard_normal((16, 576)).astype(np.float32) * np.geomspace(1e-3, 1, 16)[:, None]
    samples = {"input": x.astype(np.float32), "state": np.zeros((2, 1, 128), np.float32), "sr": np.array(16000)}
    result = rdoq_onnx.quantize(ZOO / "silero_vad" / "model.onnx", samples, threads=1)
    assert all("a vector that it reads" in s.reason for s in result.report.skipped)  # biases
    assert {x.op for x in result.report.weight_only} == {"Conv", "LSTM"}
    assert result.report.output_bytes < 0.31 * result.report.input_bytes
    assert result.report.sqnr_db > 20
