"""The bundled decoder as the model builder of onnxruntime-genai writes it: GroupQueryAttention and fused RMS norms."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.conftest import ROOT

DEPTH, HEADS, SHARED, WIDTH = 3, 4, 2, 16


def genai_decoder() -> onnx.ModelProto:
    """Return a model with the weights, inputs and outputs of plays_decoder_cached.onnx."""
    source = onnx.load(ROOT / "models" / "plays_decoder_cached.onnx")
    weights = {t.name.removeprefix("decoder."): numpy_helper.to_array(t) for t in source.graph.initializer}
    angles = np.outer(np.arange(256), 10_000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH))
    stored = {"cos_cache": np.cos(angles), "sin_cache": np.sin(angles), "table": weights["embed.weight"]}
    stored |= {"lm_head": weights["embed.weight"].T, "one": np.array([1], np.int64), "last": np.array(1, np.int64)}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x0"]),
        helper.make_node("ReduceSum", ["attention_mask", "one"], ["sums"], keepdims=1),
        helper.make_node("Sub", ["sums", "one"], ["ends"]),
        helper.make_node("Cast", ["ends"], ["seqlens_k"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["mask_shape"]),
        helper.make_node("Gather", ["mask_shape", "last"], ["total"], axis=0),
        helper.make_node("Cast", ["total"], ["total_sequence_length"], to=TensorProto.INT32),
    ]

    def linear(x: str, name: str) -> str:
        stored[name] = weights[f"{name}.weight"].T
        nodes.append(helper.make_node("MatMul", [x, name], [f"{name}/out"], f"/{name}/MatMul"))
        return f"{name}/out"

    def norm(x: str, name: str, skip: str = "") -> tuple[str, str]:
        """Return the normalized sum of `x` and `skip`, and the sum."""
        stored[f"{name}.scale"] = weights[f"{name}.weight"]
        outputs, scale = [f"{name}/norm", f"{name}/sum"], f"{name}.scale"
        if not skip:
            node = helper.make_node("SimplifiedLayerNormalization", [x, scale], outputs[:1], axis=-1, epsilon=1e-5)
            nodes.append(node)
            return outputs[0], x
        added = [outputs[0], "", "", outputs[1]]
        kind = "SkipSimplifiedLayerNormalization"
        nodes.append(helper.make_node(kind, [skip, x, scale], added, domain="com.microsoft", epsilon=1e-5))
        return outputs[0], outputs[1]

    x, behind = "x0", ""
    for k in range(DEPTH):
        block = f"blocks.{k}"
        normal, x = norm(behind or x, f"{block}.attention_norm", x if behind else "")
        q, key, value = (linear(normal, f"{block}.{part}") for part in "qkv")
        caches = [f"past_key_values.{k}.key", f"past_key_values.{k}.value"]
        lengths = ["seqlens_k", "total_sequence_length", "cos_cache", "sin_cache"]
        results = [f"{block}/attention", f"present.{k}.key", f"present.{k}.value"]
        settings = {"num_heads": HEADS, "kv_num_heads": SHARED, "do_rotary": 1}
        operands = [q, key, value, *caches, *lengths]
        nodes.append(
            helper.make_node(
                "GroupQueryAttention", operands, results, f"/{block}/Attention", domain="com.microsoft", **settings
            )
        )
        normal, x = norm(linear(results[0], f"{block}.o"), f"{block}.norm", x)
        gate = linear(normal, f"{block}.gate")
        nodes.append(helper.make_node("Sigmoid", [gate], [f"{gate}/sigmoid"]))
        nodes.append(helper.make_node("Mul", [gate, f"{gate}/sigmoid"], [f"{gate}/silu"]))
        nodes.append(helper.make_node("Mul", [f"{gate}/silu", linear(normal, f"{block}.up")], [f"{block}/product"]))
        behind = linear(f"{block}/product", f"{block}.down")
    normal, _ = norm(behind, "norm", x)
    nodes.append(helper.make_node("MatMul", [normal, "lm_head"], ["logits"], "/lm_head/MatMul"))
    inputs = [i for i in source.graph.input if i.name != "position_ids"]
    tensors = [
        numpy_helper.from_array(v if v.dtype == np.int64 else v.astype(np.float32), n) for n, v in stored.items()
    ]
    graph = helper.make_graph(nodes, "main_graph", inputs, list(source.graph.output), tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
