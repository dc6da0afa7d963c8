"""The graph of a Llama-shaped decoder, with the names and the operators (opset 17) that exporters give it.

Pre-norm: x ← x + Attention(RMSNorm(x)), x ← x + SwiGLU(RMSNorm(x)). Deviations of the weights are such that the root
mean square of x grows `GROWTH`-fold over all layers, whatever their number, and that logits deviate by about `LOGITS`.
"""

import math

import numpy as np
from drafts import Draft
from onnx import TensorProto
from random_weights import Floats
from shapes import Decoder

BATCH, NEW, PAST, ALL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
EPSILON, BASE = 1e-5, 10000.0
MASKED = float(np.finfo(np.float32).min)
GROWTH, LOGITS = 4.0, 3.0
QUERY, VALUE, GATE = 1.3, 1.0, 1.5  # deviations of queries and keys, of values and ups, of gates
ATTENDED, GATED = 0.6, 1.0  # deviations of what the last products of attention and SwiGLU get


def draft_decoder(shape: Decoder, seed: int) -> Draft:
    """Draft the decoder; the same seed gives the same weights with and without caches."""
    draft = Draft(seed)
    ids = draft.input("input_ids", TensorProto.INT64, BATCH, NEW)
    mask = draft.input("attention_mask", TensorProto.INT64, BATCH, ALL if shape.cache else NEW)
    positions = draft.input("position_ids", TensorProto.INT64, BATCH, NEW)
    draft.output("logits", BATCH, NEW, shape.vocabulary)
    spread = LOGITS / math.sqrt(shape.width)  # of the table
    table = draft.matrix("model.embed_tokens.weight", (shape.vocabulary, shape.width), spread)
    x = draft.node("Gather", "/model/embed_tokens/Gather", table, ids)
    bias = _mask(draft, ids, mask)
    rotations = _rotations(draft, positions, shape)
    added = spread * math.sqrt((GROWTH**2 - 1) / (2 * shape.layers))
    for k in range(shape.layers):
        x = _attention(draft, x, k, bias, rotations, shape, added)
        x = _feed_forward(draft, x, k, shape, added)
    _head(draft, x, table, shape)
    return draft


def _attention(
    draft: Draft, x: str, k: int, bias: str, rotations: tuple[str, str], shape: Decoder, added: float
) -> str:
    """Add grouped-query attention with rotated positions and the residual."""
    layer, path, name = f"/model/layers.{k}", f"/model/layers.{k}/self_attn", f"model.layers.{k}.self_attn"
    width, kv = shape.width, shape.kv_heads * shape.head_width
    normal, gains = _norm(draft, x, f"{layer}/input_layernorm", f"model.layers.{k}.input_layernorm", width)
    parts = {}
    for part, size, deviation in (("q", width, QUERY), ("k", kv, QUERY), ("v", kv, VALUE)):
        weight = draft.matrix(f"{name}.{part}_proj.weight", (width, size), deviation / math.sqrt(width), gains)
        product = draft.node("MatMul", f"{path}/{part}_proj/MatMul", normal, weight)
        split = draft.constant(path, [0, 0, size // shape.head_width, shape.head_width])
        heads = draft.node("Reshape", f"{path}/{part}_proj/Reshape", product, split)
        parts[part] = draft.node("Transpose", f"{path}/{part}_proj/Transpose", heads, perm=[0, 2, 1, 3])
    query, key = (_rotated(draft, parts[p], f"{path}/{p}_rotary", rotations, shape.head_width) for p in "qk")
    value = parts["v"]
    if shape.cache:
        key, value = (_cached(draft, t, k, part, shape) for t, part in ((key, "key"), (value, "value")))
    key, value = (_repeated(draft, t, f"{path}/{part}", shape) for t, part in ((key, "key"), (value, "value")))
    turned = draft.node("Transpose", f"{path}/Transpose", key, perm=[0, 1, 3, 2])
    scores = draft.node("MatMul", f"{path}/MatMul", query, turned)
    scaled = draft.binary("Div", f"{path}/Div", scores, math.sqrt(shape.head_width))
    masked = draft.node("Add", f"{path}/Add", scaled, bias)
    weights = draft.node("Softmax", f"{path}/Softmax", masked, axis=-1)
    mixed = draft.node("MatMul", f"{path}/MatMul_1", weights, value)
    turned = draft.node("Transpose", f"{path}/Transpose_1", mixed, perm=[0, 2, 1, 3])
    flat = draft.node("Reshape", f"{path}/Reshape", turned, draft.constant(path, [0, 0, width]))
    weight = draft.matrix(f"{name}.o_proj.weight", (width, width), added / ATTENDED / math.sqrt(width))
    out = draft.node("MatMul", f"{path}/o_proj/MatMul", flat, weight)
    return draft.node("Add", f"{layer}/Add", x, out)


def _feed_forward(draft: Draft, x: str, k: int, shape: Decoder, added: float) -> str:
    """Add SwiGLU and the residual."""
    layer, path, name = f"/model/layers.{k}", f"/model/layers.{k}/mlp", f"model.layers.{k}.mlp"
    after = "post_attention_layernorm"
    normal, gains = _norm(draft, x, f"{layer}/{after}", f"model.layers.{k}.{after}", shape.width)
    wide, root = (shape.width, shape.hidden), math.sqrt(shape.width)
    weights = {
        "gate": draft.matrix(f"{name}.gate_proj.weight", wide, GATE / root, gains),
        "up": draft.matrix(f"{name}.up_proj.weight", wide, VALUE / root, gains),
    }
    gate, up = (draft.node("MatMul", f"{path}/{p}_proj/MatMul", normal, weights[p]) for p in weights)
    sigmoid = draft.node("Sigmoid", f"{path}/act_fn/Sigmoid", gate)
    active = draft.node("Mul", f"{path}/act_fn/Mul", gate, sigmoid)
    product = draft.node("Mul", f"{path}/Mul", active, up)
    deviation = added / GATED / math.sqrt(shape.hidden)
    down = draft.matrix(f"{name}.down_proj.weight", (shape.hidden, shape.width), deviation)
    out = draft.node("MatMul", f"{path}/down_proj/MatMul", product, down)
    return draft.node("Add", f"{layer}/Add_1", x, out)


def _head(draft: Draft, x: str, table: str, shape: Decoder) -> None:
    """Add the last norm and the product that gives the logits."""
    normal, gains = _norm(draft, x, "/model/norm", "model.norm", shape.width, power=0 if shape.tied else 1)
    if shape.tied:
        gains[::2] *= -1  # or each token would predict itself
        weight = draft.node("Transpose", "/lm_head/Transpose", table, perm=[1, 0])
    else:
        deviation = LOGITS / math.sqrt(shape.width)
        weight = draft.matrix("lm_head.weight", (shape.width, shape.vocabulary), deviation, gains)
    draft.node("MatMul", "/lm_head/MatMul", normal, weight, output="logits")


def _norm(draft: Draft, x: str, path: str, name: str, width: int, power: int = 1) -> tuple[str, Floats]:
    """Add x / √(mean x² + ε) times gains; return the product and the gains."""
    square = draft.binary("Pow", f"{path}/Pow", x, 2.0)
    mean = draft.node("ReduceMean", f"{path}/ReduceMean", square, axes=[-1], keepdims=1)
    root = draft.node("Sqrt", f"{path}/Sqrt", draft.binary("Add", f"{path}/Add", mean, EPSILON))
    inverse = draft.node("Div", f"{path}/Div", draft.constant(path, 1.0), root)
    normal = draft.node("Mul", f"{path}/Mul", x, inverse)
    gains = draft.gains(f"{name}.weight", width, power)
    return draft.node("Mul", f"{path}/Mul_1", f"{name}.weight", normal), gains


def _rotations(draft: Draft, positions: str, shape: Decoder) -> tuple[str, str]:
    """Add cosine and sine of position times frequency, [batch, 1, sequence, head width]."""
    path, half = "/model/rotary_emb", shape.head_width // 2
    inverse = BASE ** (-np.arange(half, dtype=np.float32) / half)
    draft.stored("model.rotary_emb.inv_freq", inverse.astype(np.float32)[None, :, None])
    batch = draft.node("Shape", f"{path}/Shape", positions, start=0, end=1)
    sizes = draft.node("Concat", f"{path}/Concat", batch, draft.constant(path, [half, 1]), axis=0)
    frequencies = draft.node("Expand", f"{path}/Expand", "model.rotary_emb.inv_freq", sizes)
    rows = draft.node("Unsqueeze", f"{path}/Unsqueeze", positions, draft.constant(path, [1]))
    rows = draft.node("Cast", f"{path}/Cast", rows, to=TensorProto.FLOAT)
    angles = draft.node("MatMul", f"{path}/MatMul", frequencies, rows)
    angles = draft.node("Transpose", f"{path}/Transpose", angles, perm=[0, 2, 1])
    angles = draft.node("Concat", f"{path}/Concat_1", angles, angles, axis=-1)
    angles = draft.node("Unsqueeze", f"{path}/Unsqueeze_1", angles, draft.constant(path, [1]))
    return draft.node("Cos", f"{path}/Cos", angles), draft.node("Sin", f"{path}/Sin", angles)


def _rotated(draft: Draft, x: str, path: str, rotations: tuple[str, str], width: int) -> str:
    """Add x cos + (-x₂, x₁) sin, where x₁ and x₂ are the halves of each head."""
    axis = draft.constant(path, [-1])
    middle = draft.constant(path, [width // 2])
    ends = draft.constant(path, [0]), draft.constant(path, [2**63 - 1])
    first = draft.node("Slice", f"{path}/Slice", x, ends[0], middle, axis)
    second = draft.node("Slice", f"{path}/Slice_1", x, middle, ends[1], axis)
    turned = draft.node("Concat", f"{path}/Concat", draft.node("Neg", f"{path}/Neg", second), first, axis=-1)
    kept = draft.node("Mul", f"{path}/Mul", x, rotations[0])
    return draft.node("Add", f"{path}/Add", kept, draft.node("Mul", f"{path}/Mul_1", turned, rotations[1]))


def _cached(draft: Draft, x: str, k: int, part: str, shape: Decoder) -> str:
    """Add an input of past keys or values in front of the new ones, and an output of both."""
    sizes = shape.kv_heads, shape.head_width
    past = draft.input(f"past_key_values.{k}.{part}", TensorProto.FLOAT, BATCH, sizes[0], PAST, sizes[1])
    draft.output(f"present.{k}.{part}", BATCH, sizes[0], ALL, sizes[1])
    path = f"/model/layers.{k}/self_attn/{part}/Concat"
    return draft.node("Concat", path, past, x, output=f"present.{k}.{part}", axis=2)


def _repeated(draft: Draft, x: str, path: str, shape: Decoder) -> str:
    """Repeat each head of keys or values for the queries that share it."""
    group = shape.heads // shape.kv_heads
    if group == 1:
        return x
    wide = draft.node("Unsqueeze", f"{path}/Unsqueeze", x, draft.constant(path, [2]))
    wide = draft.node("Expand", f"{path}/Expand", wide, draft.constant(path, [1, 1, group, 1, 1]))
    return draft.node("Reshape", f"{path}/Reshape", wide, draft.constant(path, [0, shape.heads, -1, shape.head_width]))


def _mask(draft: Draft, ids: str, mask: str) -> str:
    """Add the term of the scores: 0 for past and present tokens that the mask keeps, else the least float."""
    path = "/model"
    new, total = (draft.node("Shape", f"{path}/Shape_{t}", t, start=1, end=2) for t in (ids, mask))
    axis, zero, one = draft.constant(path, [0]), draft.constant(path, 0, np.int64), draft.constant(path, 1, np.int64)
    new, total = (draft.node("Squeeze", f"{path}/Squeeze_{n}", t, axis) for n, t in enumerate((new, total)))
    past = draft.node("Sub", f"{path}/Sub", total, new)
    columns = draft.node("Range", f"{path}/Range", zero, total, one)
    rows = draft.node("Range", f"{path}/Range_1", past, total, one)
    rows = draft.node("Unsqueeze", f"{path}/Unsqueeze", rows, draft.constant(path, [1]))
    causal = draft.node("LessOrEqual", f"{path}/LessOrEqual", columns, rows)
    kept = draft.node("Cast", f"{path}/Cast", mask, to=TensorProto.BOOL)
    kept = draft.node("Unsqueeze", f"{path}/Unsqueeze_1", kept, draft.constant(path, [1, 2]))
    both = draft.node("And", f"{path}/And", causal, kept)
    return draft.node("Where", f"{path}/Where", both, draft.constant(path, 0.0), draft.constant(path, MASKED))
