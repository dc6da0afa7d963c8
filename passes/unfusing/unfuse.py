"""Write fused operators out as the standard operators that they stand for.

Quantizers then fit in between, and channels, tables and attention are found where they are in any other model. ONNX
Runtime fuses most of them again when it loads the model. The numbers stay the same up to float rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from onnx import ModelProto, NodeProto
from onnx.helper import make_opsetid

from rdoq_onnx.errors import ModelError
from rdoq_onnx.model import surgeon
from rdoq_onnx.model.protos import all_nodes, default_opset
from rdoq_onnx.model.surgeon import Graph
from rdoq_onnx.model.validate import MICROSOFT
from rdoq_onnx.passes import Pass
from rdoq_onnx.passes.normalization.normalize import raise_opset
from rdoq_onnx.passes.unfusing import activations, attention, grouped, norms, products, rotary
from rdoq_onnx.passes.unfusing.block import Block, Rule, tensor_types

OPSET = 17  # LayerNormalization's
_NORM = "LayerNormalization"

# By domain and type. What is quantized goes inside these.
OPENED: Mapping[tuple[str, str], Rule] = {
    ("", "SimplifiedLayerNormalization"): norms.rms_norm,
    (MICROSOFT, "Attention"): attention.packed_attention,
    (MICROSOFT, "BiasGelu"): activations.bias_gelu,
    (MICROSOFT, "EmbedLayerNormalization"): norms.embed_layer_norm,
    (MICROSOFT, "FastGelu"): activations.fast_gelu,
    (MICROSOFT, "FusedMatMul"): products.fused_matmul,
    (MICROSOFT, "Gelu"): activations.gelu,
    (MICROSOFT, "QuickGelu"): activations.quick_gelu,
    (MICROSOFT, "SkipLayerNormalization"): norms.skip_layer_norm,
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): norms.skip_rms_norm,
}
# Products of activations are inside these.
PRODUCTS: Mapping[tuple[str, str], Rule] = {
    ("", "Attention"): attention.standard_attention,
    (MICROSOFT, "MultiHeadAttention"): attention.multi_head_attention,
}
# These stay in the emitted model; they are written out to differentiate through them.
CLOSED: Mapping[tuple[str, str], Rule] = {
    ("", "Gelu"): activations.gelu,
    ("", "RMSNormalization"): norms.rms_norm,
    ("", "RotaryEmbedding"): rotary.standard_rotary,
    (MICROSOFT, "GroupQueryAttention"): grouped.group_query_attention,
    (MICROSOFT, "RotaryEmbedding"): rotary.microsoft_rotary,
}


@dataclass(frozen=True)
class Unfuse(Pass):
    """Write out the operators of `OPENED`; with `products`, also those of `PRODUCTS`, with `closed` those of `CLOSED`.

    Raises the opset to 17 for that. Leaves other operators, forms that no rule covers (shared buffers of caches,
    packed operands, unknown ranks) and bodies of If, Loop and Scan. Returns a model without such nodes unchanged.
    """

    products: bool = True
    closed: bool = False

    def __call__(self, model: ModelProto) -> ModelProto:
        rules = {**OPENED, **(PRODUCTS if self.products else {}), **(CLOSED if self.closed else {})}
        if not any(_key(node) in rules for node in model.graph.node):
            return model
        model = _raised(model)
        while (
            default_opset(model) >= OPSET
        ):  # a rule may need ranks that are known once the nodes before are written out
            before, model = model, _swept(model, rules)
            if model is before:
                break
        return model

    def ensures(self, model: ModelProto) -> None:
        """Nothing beyond what `check` verifies."""


def _key(node: NodeProto | surgeon.Node) -> tuple[str, str]:
    op = node.op_type if isinstance(node, NodeProto) else node.op
    return ("" if node.domain in (None, "", "ai.onnx") else str(node.domain), str(op))


def _swept(model: ModelProto, rules: Mapping[tuple[str, str], Rule]) -> ModelProto:
    """Write out each node whose rule has what it needs; `model` itself if there is none."""
    types, changed = tensor_types(model), []

    def sweep(graph: Graph) -> None:
        for node in list(graph.nodes):
            if _key(node) in rules and not surgeon.in_body(graph, node):
                block = Block(graph, node, types, len(graph.nodes))
                results = rules[_key(node)](block) if block.is_float32 else None
                if results is None:
                    block.withdraw()
                else:
                    block.replace(results)
                    changed.append(node)

    result = surgeon.edit(model, sweep)
    return result if changed else model


def _raised(model: ModelProto) -> ModelProto:
    """Raise the opset to `OPSET`, if onnx's converter can; ONNX Runtime's LayerNormalization becomes the standard's."""
    if default_opset(model) >= OPSET:
        return model
    result = ModelProto()
    result.CopyFrom(model)
    if not any(o.domain == MICROSOFT for o in result.opset_import):
        result.opset_import.append(make_opsetid(MICROSOFT, 1))
    for node in all_nodes(result.graph):
        if _key(node) == ("", _NORM):
            node.domain = MICROSOFT  # which the converter passes over
    try:
        result = raise_opset(result, OPSET)
    except ModelError:
        return model
    for node in all_nodes(result.graph):
        if _key(node) == (MICROSOFT, _NORM):
            node.domain = ""
    return result
