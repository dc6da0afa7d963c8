"""The graph of a BERT-shaped encoder, with the names and the operators (opset 17) that exporters give it.

Post-norm: x ← LayerNorm(x + Attention(x)), x ← LayerNorm(x + W₂ GELU(W₁ x)). The norm behind attention shrinks the
channels that the other norms amplify, or these would drown all others within two layers.
"""

import math

import numpy as np
from drafts import Draft
from onnx import TensorProto
from random_weights import Floats
from shapes import Encoder

BATCH, TOKENS = "batch_size", "sequence_length"
EPSILON = 1e-12
MASKED = float(np.finfo(np.float32).min)
QUERY, VALUE, WIDE = 1.6, 1.0, 2.0  # deviations of queries and keys, of values, of what GELU gets
MIXED, FED = 0.3, 0.7  # deviations of what attention and the products with GELU add
ATTENDED, ACTIVE = 0.6, 0.9  # deviations of what the last product of each gets


def draft_encoder(shape: Encoder, seed: int) -> Draft:
    """Draft the encoder."""
    draft = Draft(seed)
    ids = draft.input("input_ids", TensorProto.INT64, BATCH, TOKENS)
    mask = draft.input("attention_mask", TensorProto.INT64, BATCH, TOKENS)
    kinds = draft.input("token_type_ids", TensorProto.INT64, BATCH, TOKENS)
    x, gains = _embeddings(draft, ids, kinds, shape)
    bias = _mask(draft, mask)
    for k in range(shape.layers):
        x, gains = _attention(draft, x, gains, k, bias, shape)
        x, gains = _feed_forward(draft, x, gains, k, shape)
    draft.nodes[-1].output[0] = "last_hidden_state"
    draft.output("last_hidden_state", BATCH, TOKENS, shape.width)
    return draft


def _embeddings(draft: Draft, ids: str, kinds: str, shape: Encoder) -> tuple[str, Floats]:
    """Add the sum of the words', types' and positions' rows, and its norm."""
    path, name = "/embeddings", "embeddings"
    words = _rows(draft, "word", ids, shape.vocabulary, shape)
    types = _rows(draft, "token_type", kinds, 2, shape)
    draft.stored(f"{name}.position_ids", np.arange(shape.positions)[None])
    length = draft.node("Shape", f"{path}/Shape", ids, start=1, end=2)
    begin, axis = draft.constant(path, [0]), draft.constant(path, [1])
    positions = draft.node("Slice", f"{path}/Slice", f"{name}.position_ids", begin, length, axis)
    places = _rows(draft, "position", positions, shape.positions, shape)
    x = draft.node("Add", f"{path}/Add", words, types)
    x = draft.node("Add", f"{path}/Add_1", x, places)
    return _norm(draft, x, f"{path}/LayerNorm", shape)


def _rows(draft: Draft, kind: str, indices: str, count: int, shape: Encoder) -> str:
    part = f"{kind}_embeddings"
    table = draft.matrix(f"embeddings.{part}.weight", (count, shape.width), 1.0 if kind == "word" else 0.3)
    return draft.node("Gather", f"/embeddings/{part}/Gather", table, indices)


def _attention(draft: Draft, x: str, gains: Floats, k: int, bias: str, shape: Encoder) -> tuple[str, Floats]:
    """Add attention, the residual and the norm."""
    path = f"/encoder/layer.{k}/attention"
    own, split = f"{path}/self", [0, 0, shape.heads, shape.head_width]
    parts = {}
    for part, deviation in (("query", QUERY), ("key", QUERY), ("value", VALUE)):
        product = _linear(draft, x, f"{own}/{part}", (shape.width, shape.width), deviation, gains)
        heads = draft.node("Reshape", f"{own}/{part}/Reshape", product, draft.constant(own, split))
        order = [0, 2, 3, 1] if part == "key" else [0, 2, 1, 3]
        parts[part] = draft.node("Transpose", f"{own}/{part}/Transpose", heads, perm=order)
    scores = draft.node("MatMul", f"{own}/MatMul", parts["query"], parts["key"])
    scaled = draft.binary("Div", f"{own}/Div", scores, math.sqrt(shape.head_width))
    weights = draft.node("Softmax", f"{own}/Softmax", draft.node("Add", f"{own}/Add", scaled, bias), axis=-1)
    mixed = draft.node("MatMul", f"{own}/MatMul_1", weights, parts["value"])
    turned = draft.node("Transpose", f"{own}/Transpose", mixed, perm=[0, 2, 1, 3])
    flat = draft.node("Reshape", f"{own}/Reshape", turned, draft.constant(own, [0, 0, shape.width]))
    out = _linear(draft, flat, f"{path}/output/dense", (shape.width, shape.width), MIXED / ATTENDED)
    added = draft.node("Add", f"{path}/output/Add", out, x)
    return _norm(draft, added, f"{path}/output/LayerNorm", shape, power=-1)


def _feed_forward(draft: Draft, x: str, gains: Floats, k: int, shape: Encoder) -> tuple[str, Floats]:
    """Add both products with GELU between them, the residual and the norm."""
    path = f"/encoder/layer.{k}"
    act = f"{path}/intermediate/intermediate_act_fn"
    wide = _linear(draft, x, f"{path}/intermediate/dense", (shape.width, shape.hidden), WIDE, gains)
    erf = draft.node("Erf", f"{act}/Erf", draft.binary("Div", f"{act}/Div", wide, math.sqrt(2)))
    product = draft.node("Mul", f"{act}/Mul", wide, draft.binary("Add", f"{act}/Add", erf, 1.0))
    active = draft.binary("Mul", f"{act}/Mul_1", product, 0.5)
    out = _linear(draft, active, f"{path}/output/dense", (shape.hidden, shape.width), FED / ACTIVE)
    return _norm(draft, draft.node("Add", f"{path}/output/Add", out, x), f"{path}/output/LayerNorm", shape)


def _linear(
    draft: Draft, x: str, path: str, sizes: tuple[int, int], deviation: float, gains: Floats | None = None
) -> str:
    """Add a product and its bias; `deviation` is that of the product for inputs with deviation 1 and gain 1."""
    name = path[1:].replace("/", ".")
    weight = draft.matrix(f"{name}.weight", sizes, deviation / math.sqrt(sizes[0]), gains)
    product = draft.node("MatMul", f"{path}/MatMul", x, weight)
    return draft.node("Add", f"{path}/Add", draft.offsets(f"{name}.bias", sizes[1]), product)


def _norm(draft: Draft, x: str, path: str, shape: Encoder, power: int = 1) -> tuple[str, Floats]:
    """Add (x - mean) / √(variance + ε) times gains plus bias; return the sum and the gains."""
    name = path[1:].replace("/", ".")
    gain, bias = f"{name}.weight", f"{name}.bias"
    values = draft.gains(gain, shape.width, power)
    draft.offsets(bias, shape.width)
    if not shape.decomposed:
        path = f"{path}/LayerNormalization"
        return draft.node("LayerNormalization", path, x, gain, bias, axis=-1, epsilon=EPSILON), values
    mean = draft.node("ReduceMean", f"{path}/ReduceMean", x, axes=[-1], keepdims=1)
    centred = draft.node("Sub", f"{path}/Sub", x, mean)
    square = draft.binary("Pow", f"{path}/Pow", centred, 2.0)
    variance = draft.node("ReduceMean", f"{path}/ReduceMean_1", square, axes=[-1], keepdims=1)
    root = draft.node("Sqrt", f"{path}/Sqrt", draft.binary("Add", f"{path}/Add", variance, EPSILON))
    normal = draft.node("Div", f"{path}/Div", centred, root)
    return draft.node("Add", f"{path}/Add_1", draft.node("Mul", f"{path}/Mul", normal, gain), bias), values


def _mask(draft: Draft, mask: str) -> str:
    """Add the term of the scores: 0 for tokens that the mask keeps, else the least float."""
    wide = draft.node("Unsqueeze", "/Unsqueeze", mask, draft.constant("", [1, 2]))
    kept = draft.node("Cast", "/Cast", wide, to=TensorProto.FLOAT)
    hidden = draft.node("Sub", "/Sub", draft.constant("", 1.0), kept)
    return draft.binary("Mul", "/Mul", hidden, MASKED)
