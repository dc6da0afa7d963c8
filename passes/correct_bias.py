"""A constant added to a layer's outputs, where the layer or its neighbour can take it up without a new operator."""

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.surgeon import Constant, Graph, Node, Tensor


def add_to_bias(graph: Graph, node: Node, shift: NDArray[np.float64], weight_side: int) -> None:
    """Add `shift` [outputs] to what a Conv, ConvTranspose, Gemm or MatMul gives, in float32.

    It goes into the bias, which is made where there is none; for MatMul into the constant of the Add that alone reads
    it. Only if that cannot be, an Add is put behind the layer.
    """
    beta = float(node.attrs.get("beta", 1.0)) if node.op == "Gemm" else 1.0
    if node.op != "MatMul" and beta:
        scaled = shift / beta
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is None or not bias.name:
            added = _constant(graph, f"{node.name}_bias", scaled)
            if bias is None:
                node.inputs.append(added)
            else:
                node.inputs[2] = added
            return
        if isinstance(bias, Constant):
            node.inputs[2] = _constant(graph, f"{bias.name}_corrected", bias.values + scaled)
            return
    output: Tensor = node.outputs[0]
    aligned = shift
    if node.op.startswith("Conv"):
        aligned = shift.reshape(-1, *[1] * (len(node.inputs[1].shape) - 2))
    elif weight_side == 0:
        aligned = shift[:, None]
    reader = output.outputs[0] if len(output.outputs) == 1 else None
    if reader is not None and reader.op == "Add" and not any(output is t for t in graph.outputs):
        for index, tensor in enumerate(reader.inputs):
            if isinstance(tensor, Constant) and tensor.values.ndim <= aligned.ndim:
                reader.inputs[index] = _constant(graph, f"{tensor.name}_corrected", tensor.values + aligned)
                return
    added = _constant(graph, f"{node.name}_bias", aligned)
    name = output.name
    total = surgeon.insert_after(
        graph, output, lambda t: surgeon.append(graph, "Add", [t, added], f"{node.name}_AddBias", like=output)
    )
    if output.name == name:  # what is quantized under this name is the sum
        total.name, output.name = name, total.name


def _constant(graph: Graph, stem: str, value: NDArray[np.float64]) -> Constant:
    return surgeon.constant(surgeon.fresh(graph, stem), value.astype(np.float32))
