"""Small models of fused operators, each with the feeds of a run: what unfusing and gradients are tested on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, parser

Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """nodes: ONNX text between `inputs` and `outputs`; w* and b* are weights of the given sizes."""

    inputs: str
    nodes: str
    outputs: str
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    integers: Mapping[str, Any] = field(default_factory=dict)  # feeds that are not random floats
    opset: int = 17

    @property
    def model(self) -> onnx.ModelProto:
        head = f'<ir_version: 10, opset_import: ["": {self.opset}, "com.microsoft": 1]>'
        model = parser.parse_model(f"{head} g ({self.inputs}) => ({self.outputs}) {{ {self.nodes} }}")
        rng = np.random.default_rng(1)
        for name, shape in self.weights.items():
            array = rng.standard_normal(shape, np.float32) / 2
            model.graph.initializer.append(numpy_helper.from_array(array, name))
        return model

    @property
    def feeds(self) -> dict[str, Array]:
        """Free sizes are 2."""
        rng = np.random.default_rng(2)
        feeds: dict[str, Array] = {}
        for value in self.model.graph.input:
            kind = value.type.tensor_type
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            if value.name in self.integers:
                feeds[value.name] = np.asarray(self.integers[value.name], dtype)
            else:
                shape = [d.dim_value if d.HasField("dim_value") else 2 for d in kind.shape.dim]
                feeds[value.name] = rng.standard_normal(shape).astype(dtype)
        return feeds


X = "float[N, 5, 8] x"
QKV = "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)"
PROJECTIONS = {"wq": (8, 12), "wk": (8, 12), "wv": (8, 12)}
GROUPED = {"wq": (8, 16), "wk": (8, 8), "wv": (8, 8)}
ANGLES = {"wcos": (20, 2), "wsin": (20, 2)}

GELUS = {
    "Gelu": Case(X, "z = MatMul(x, w) y = com.microsoft.Gelu(z)", "float[N, 5, 6] y", {"w": (8, 6)}),
    "BiasGelu": Case(
        X, "z = MatMul(x, w) y = com.microsoft.BiasGelu(z, b)", "float[N, 5, 6] y", {"w": (8, 6), "b": (6,)}
    ),
    "FastGelu": Case(X, "z = MatMul(x, w) y = com.microsoft.FastGelu(z)", "float[N, 5, 6] y", {"w": (8, 6)}),
    "FastGelu with a bias": Case(
        X, "z = MatMul(x, w) y = com.microsoft.FastGelu(z, b)", "float[N, 5, 6] y", {"w": (8, 6), "b": (6,)}
    ),
    "QuickGelu": Case(
        X, "z = MatMul(x, w) y = com.microsoft.QuickGelu <alpha = 1.5> (z)", "float[N, 5, 6] y", {"w": (8, 6)}
    ),
}
STANDARD_GELUS = {
    "standard Gelu": Case(X, "z = MatMul(x, w) y = Gelu(z)", "float[N, 5, 6] y", {"w": (8, 6)}, opset=20),
    "standard Gelu by tanh": Case(
        X, 'z = MatMul(x, w) y = Gelu <approximate = "tanh"> (z)', "float[N, 5, 6] y", {"w": (8, 6)}, opset=20
    ),
}

NORMED = {"w": (8, 6), "wg": (6,), "wb": (6,), "b": (6,)}
WORDS = {"w0": (9, 6), "w1": (7, 6), "w2": (2, 6), "wg": (6,), "wb": (6,)}
IDS = {"ids": [[0, 3, 8, 2], [1, 1, 5, 7]], "segments": [[0, 0, 1, 1], [0, 1, 1, 1]]}
NORMS = {
    "SkipLayerNormalization": Case(
        f"{X}, float[N, 5, 6] s",
        "z = MatMul(x, w) y, , , t = com.microsoft.SkipLayerNormalization <epsilon = 0.001> (z, s, wg, wb, b)",
        "float[N, 5, 6] y, float[N, 5, 6] t",
        NORMED,
    ),
    "SkipLayerNormalization without a sum": Case(
        f"{X}, float[N, 5, 6] s",
        "z = MatMul(x, w) y = com.microsoft.SkipLayerNormalization <epsilon = 0.001> (s, z, wg, wb, b)",
        "float[N, 5, 6] y",
        NORMED,
    ),
    "SkipLayerNormalization of opset 12": Case(
        f"{X}, float[N, 5, 6] s",
        "z = MatMul(x, w) u = com.microsoft.SkipLayerNormalization <epsilon = 0.001> (z, s, wg) "
        "y = LayerNormalization <epsilon = 0.01, axis = -1> (u, wg, wb)",
        "float[N, 5, 6] y",
        NORMED,
        opset=12,
    ),
    "SkipSimplifiedLayerNormalization": Case(
        f"{X}, float[N, 5, 6] s",
        "z = MatMul(x, w) y, , , t = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.001> (z, s, wg, b)",
        "float[N, 5, 6] y, float[N, 5, 6] t",
        NORMED,
    ),
    "SimplifiedLayerNormalization": Case(
        X,
        "z = MatMul(x, w) y = SimplifiedLayerNormalization <epsilon = 0.001, axis = -1, stash_type = 1> (z, wg)",
        "float[N, 5, 6] y",
        NORMED,
        opset=21,
    ),
    "EmbedLayerNormalization": Case(
        "int32[N, 4] ids, int32[N, 4] segments",
        "y, m = com.microsoft.EmbedLayerNormalization <epsilon = 0.001> (ids, segments, w0, w1, w2, wg, wb)",
        "float[N, 4, 6] y",
        WORDS,
        IDS,
    ),
    "EmbedLayerNormalization with a mask": Case(
        "int32[N, 4] ids, int32[N, 4] mask, int32[N, 4] positions",
        "y, m, e = com.microsoft.EmbedLayerNormalization <epsilon = 0.001> (ids, , w0, w1, , wg, wb, mask, positions)",
        "float[N, 4, 6] y, int32[N] m, float[N, 4, 6] e",
        WORDS,
        {**IDS, "mask": [[1, 1, 1, 1], [1, 1, 0, 0]], "positions": [[0, 1, 2, 3], [3, 2, 1, 0]]},
    ),
}
STANDARD_NORMS = {
    "RMSNormalization": Case(
        X,
        "z = MatMul(x, w) y = RMSNormalization <epsilon = 0.001> (z, wg)",
        "float[N, 5, 6] y",
        NORMED,
        opset=23,
    ),
}

PRODUCTS = {
    "FusedMatMul": Case(
        "float[N, 3, 5, 8] x, float[N, 3, 7, 8] z",
        "y = com.microsoft.FusedMatMul <transB = 1, alpha = 0.25> (x, z)",
        "float[N, 3, 5, 7] y",
    ),
    "FusedMatMul with a weight": Case(
        "float[N, 8, 5] x",
        "y = com.microsoft.FusedMatMul <transA = 1, transB = 1> (x, w)",
        "float[N, 5, 6] y",
        {"w": (6, 8)},
    ),
}

MULTI = "com.microsoft.MultiHeadAttention <num_heads = 3"
PACKED = "com.microsoft.Attention <num_heads = 3"
LENGTHS = {"mask": [5, 3]}
PADDED = {"mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]}
ATTENTION = {
    "MultiHeadAttention": Case(X, f"{QKV} y = {MULTI}> (q, k, v)", "float[N, 5, 12] y", PROJECTIONS),
    "MultiHeadAttention with a bias and a mask": Case(
        f"{X}, int32[N, 5] mask",
        f"{QKV} y = {MULTI}, scale = 0.3> (q, k, v, b, mask)",
        "float[N, 5, 12] y",
        {**PROJECTIONS, "b": (36,)},
        PADDED,
    ),
    "MultiHeadAttention with lengths": Case(
        f"{X}, int32[N] mask",
        f"{QKV} y = {MULTI}, mask_filter_value = -50.0> (q, k, v, , mask)",
        "float[N, 5, 12] y",
        PROJECTIONS,
        LENGTHS,
    ),
    "MultiHeadAttention with a bias of scores": Case(
        f"{X}, float[1, 3, 5, 5] m",
        f"{QKV} y = {MULTI}, unidirectional = 1> (q, k, v, , , m)",
        "float[N, 5, 12] y",
        PROJECTIONS,
    ),
    "MultiHeadAttention with caches": Case(
        f"{X}, float[N, 3, P, 4] pk, float[N, 3, P, 4] pv",
        f"{QKV} y, k2, v2 = {MULTI}, unidirectional = 1> (q, k, v, , , , pk, pv)",
        "float[N, 5, 12] y, float[N, 3, T, 4] k2, float[N, 3, T, 4] v2",
        PROJECTIONS,
    ),
    "MultiHeadAttention across": Case(
        f"{X}, float[N, 3, 7, 4] k, float[N, 3, 7, 4] v",
        f"q = MatMul(x, wq) y = {MULTI}> (q, k, v)",
        "float[N, 5, 12] y",
        {"wq": (8, 12)},
    ),
    "packed Attention": Case(
        f"{X}, int32[N, 5] mask",
        f"y = {PACKED}> (x, w, b, mask)",
        "float[N, 5, 12] y",
        {"w": (8, 36), "b": (36,)},
        PADDED,
    ),
    "packed Attention, causal, with lengths": Case(
        f"{X}, int32[N] mask",
        f"y = {PACKED}, unidirectional = 1> (x, w, b, mask)",
        "float[N, 5, 12] y",
        {"w": (8, 36), "b": (36,)},
        LENGTHS,
    ),
    "Attention": Case(X, f"{QKV} y = Attention <q_num_heads = 3, kv_num_heads = 3> (q, k, v)", "float[N, 5, 12] y",
                      PROJECTIONS, opset=23),
    "Attention of groups, causal": Case(
        X,
        f"{QKV} y = Attention <q_num_heads = 4, kv_num_heads = 2, is_causal = 1, scale = 0.4> (q, k, v)",
        "float[N, 5, 16] y",
        GROUPED,
        opset=23,
    ),
    "Attention with a mask": Case(
        f"{X}, bool[5, 5] mask",
        f"{QKV} y = Attention <q_num_heads = 3, kv_num_heads = 3> (q, k, v, mask)",
        "float[N, 5, 12] y",
        PROJECTIONS,
        {"mask": np.tri(5, dtype=bool)},
        opset=24,
    ),
    "Attention with caches and a bias of scores": Case(
        f"{X}, float[5, 7] m, float[N, 3, P, 4] pk, float[N, 3, P, 4] pv",
        f"{QKV} y, k2, v2 = Attention <q_num_heads = 3, kv_num_heads = 3, is_causal = 1> (q, k, v, m, pk, pv)",
        "float[N, 5, 12] y, float[N, 3, T, 4] k2, float[N, 3, T, 4] v2",
        PROJECTIONS,
        opset=23,
    ),
    "Attention of four axes": Case(
        "float[N, 4, 5, 8] x, float[N, 2, 7, 8] k, float[N, 2, 7, 6] v",
        "q = MatMul(x, w) y = Attention <softcap = 0.8> (q, k, v)",
        "float[N, 4, 5, 6] y",
        {"w": (8, 8)},
        opset=23,
    ),
}  # fmt: skip

ROTARY = {
    "RotaryEmbedding": Case(
        "float[N, 3, 5, 8] x, int64[N, 5] positions",
        "z = MatMul(x, w) y = RotaryEmbedding(z, wcos, wsin, positions)",
        "float[N, 3, 5, 4] y",
        {"w": (8, 4), **ANGLES},
        {"positions": [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]},
        opset=23,
    ),
    "RotaryEmbedding, interleaved, in part, of three axes": Case(
        "float[N, 5, 8] x, int64[N, 5] positions",
        "z = MatMul(x, w) y = RotaryEmbedding <num_heads = 2, interleaved = 1, rotary_embedding_dim = 4>"
        " (z, wcos, wsin, positions)",
        "float[N, 5, 12] y",
        {"w": (8, 12), **ANGLES},
        {"positions": [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]},
        opset=23,
    ),
    "RotaryEmbedding with its own angles": Case(
        "float[N, 3, 5, 8] x, float[N, 5, 2] c, float[N, 5, 2] s",
        "z = MatMul(x, w) y = RotaryEmbedding(z, c, s)",
        "float[N, 3, 5, 4] y",
        {"w": (8, 4)},
        opset=23,
    ),
    "Microsoft's RotaryEmbedding": Case(
        "float[N, 5, 8] x, int64[N, 5] positions",
        "z = MatMul(x, w) y = com.microsoft.RotaryEmbedding <interleaved = 1> (z, positions, wcos, wsin)",
        "float[N, 5, 12] y",
        {"w": (8, 12), **ANGLES},
        {"positions": [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]},
    ),
}

GROUP = "com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2"
CACHES = "float[N, 2, P, 16] pk, float[N, 2, P, 16] pv, int32[N] ends, int32 total"
WIDE = {"wq": (8, 64), "wk": (8, 32), "wv": (8, 32), "wcos": (20, 8), "wsin": (20, 8)}
PRESENT = "float[N, 5, 64] y, float[N, 2, T, 16] k2, float[N, 2, T, 16] v2"
EMPTY = {"pk": np.zeros((2, 2, 0, 16)), "pv": np.zeros((2, 2, 0, 16)), "ends": [4, 4], "total": 5}
FILLED = {"ends": [4], "total": 5, "x": np.random.default_rng(0).standard_normal((1, 1, 8))}
FILLED |= {k: np.random.default_rng(k == "pk").standard_normal((1, 2, 4, 16)) for k in ("pk", "pv")}
GROUPS = {
    "GroupQueryAttention": Case(
        f"{X}, {CACHES}",
        f"{QKV} y, k2, v2 = {GROUP}, do_rotary = 1> (q, k, v, pk, pv, ends, total, wcos, wsin)",
        PRESENT,
        {**WIDE},
        EMPTY,
    ),
    "GroupQueryAttention of packed operands, in a window": Case(
        f"{X}, {CACHES}",
        f"q = MatMul(x, w) y, k2, v2 = {GROUP}, local_window_size = 2, softcap = 0.7, scale = 0.9>"
        " (q, , , pk, pv, ends, total)",
        PRESENT,
        {"w": (8, 128)},
        EMPTY,
    ),
    "GroupQueryAttention with a bias of scores": Case(
        f"{X}, {CACHES}, float[1, 4, 5, 5] m",
        f"{QKV} y, k2, v2 = {GROUP}> (q, k, v, pk, pv, ends, total, , , , m)",
        PRESENT,
        WIDE,
        EMPTY,
    ),
    "GroupQueryAttention with caches, interleaved": Case(
        f"float[N, S, 8] x, {CACHES}",
        f"{QKV} y, k2, v2 = {GROUP}, do_rotary = 1, rotary_interleaved = 1> (q, k, v, pk, pv, ends, total, wcos, wsin)",
        PRESENT.replace("5", "S"),
        {**WIDE},
        FILLED,
    ),
}

OPENED = GELUS | NORMS | PRODUCTS | ATTENTION
CLOSED = STANDARD_GELUS | STANDARD_NORMS | ROTARY | GROUPS
