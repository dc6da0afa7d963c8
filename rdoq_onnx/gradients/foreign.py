"""Adjoints from onnx-ad for operators without a rule here, one node at a time."""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ad
from onnx import NodeProto, TensorProto, helper

from rdoq_onnx.gradients import elementwise, products, shapes  # noqa: F401 - importing registers rules
from rdoq_onnx.gradients.tape import Grads, Tape
from rdoq_onnx.model.protos import all_names, reads, rename, subgraphs_of

SMALL = 4096  # elements of a constant whose value onnx-ad may need: axes, pads, sizes


def foreign(tape: Tape, node: NodeProto, grads: Grads) -> list[tuple[str, str]] | None:
    """Splice in onnx-ad's reverse of a model of this node alone, without its seed axis, which has size 1.

    Returns (input, adjoint) pairs, or None if onnx-ad has no rule.
    """
    read = list(dict.fromkeys(reads([node])))
    wanted = [name for name in read if tape.wants(name)]
    seeded = {name: grad for name, grad in zip(node.output, grads, strict=True) if grad is not None}
    names = {name: name for name in (*read, *node.output)}
    try:
        single = _single_node(tape, node, read, list(seeded))
        reverse = onnx_ad.reverse(single, wanted, list(seeded), prefix="adj_", dim="nadj", layout="onnx").graph
    except Exception:  # an alpha release may raise anything on an operator that it does not support
        return None
    for name, grad in seeded.items():
        names[f"adj_{name}"] = tape.reshape(grad, [*tape.shapes[name], 1])
    for tensor in reverse.initializer:
        if tensor.name not in names:
            copy = TensorProto()
            copy.CopyFrom(tensor)
            copy.name = names[tensor.name] = tape.name(f"adj/{tensor.name}")
            tape.initializers[copy.name] = copy
    # Leave out the node itself: the forward pass has it.
    spliced = [n for n in reverse.node if n.op_type != node.op_type or n.output[:] != node.output[:]]
    names.update({name: tape.name(f"adj/{name}") for n in spliced for name in n.output if name})
    nested = dict.fromkeys(name for n in spliced for inner in subgraphs_of(n) for name in all_names(inner) if name)
    names.update({name: tape.name(f"adj/{name}") for name in nested if name not in names})
    rename(spliced, names)
    for copied in spliced:
        copied.name = copied.output[0]
    tape.nodes += spliced
    return [(name, tape.reshape(names[f"adj_{name}"], tape.shapes[name])) for name in wanted]


def _single_node(tape: Tape, node: NodeProto, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    constants = [
        tape.constants[name] for name in inputs if name in tape.constants and np.prod(tape.shapes[name]) <= SMALL
    ]
    folded = {t.name for t in constants}
    read = [name for name in inputs if name not in folded]
    values = [helper.make_tensor_value_info(n, tape.dtypes[n], tape.shapes[n]) for n in (*read, *outputs)]
    graph = helper.make_graph([node], "node", values[: len(read)], values[len(read) :], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", tape.opset)], ir_version=8)
