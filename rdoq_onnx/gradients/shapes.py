"""Adjoints of movement, reduction and resampling operators."""

from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from rdoq_onnx.gradients.tape import Grads, Tape, attribute, only, rule


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    return only(node, tape.reshape(str(grads[0]), tape.shapes[node.input[0]]))


@rule("Transpose")
def _transpose(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    rank = len(tape.shapes[node.input[0]])
    perm = attribute(node, "perm") or list(reversed(range(rank)))
    return [tape.op("Transpose", str(grads[0]), perm=[int(i) for i in np.argsort(perm)])]


@rule("Expand")
def _expand(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    return only(node, tape.unbroadcast(str(grads[0]), tape.shapes[node.output[0]], node.input[0]))


@rule("Concat")
def _concat(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    axis = attribute(node, "axis")
    sizes = tape.constant([tape.shapes[name][axis] for name in node.input])
    tape.op("Split", str(grads[0]), sizes, outputs=len(node.input), axis=axis)
    parts = list(tape.nodes[-1].output)
    return [part if tape.wants(name) else None for part, name in zip(parts, node.input, strict=True)]


@rule("Split")
def _split(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    parts = []
    for grad, name in zip(grads, node.output, strict=True):
        zeros = np.zeros(tape.shapes[name]) if grad is None else None
        parts.append(tape.constant(zeros, node.input[0]) if grad is None else grad)
    return only(node, tape.op("Concat", *parts, axis=attribute(node, "axis", 0)))


@rule("Slice")
def _slice(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    shape = tape.shapes[node.input[0]]
    values = [tape.value(name) if name else None for name in [*node.input, "", ""][1:5]]
    if values[0] is None or values[1] is None:
        return NotImplemented
    axes = range(len(values[0])) if values[2] is None else values[2]
    steps = [1] * len(values[0]) if values[3] is None else values[3]
    g = str(grads[0])
    for start, stop, axis, step in zip(values[0], values[1], axes, steps, strict=True):
        picked = range(shape[axis])[int(start) : int(stop) : int(step)]
        g = _spread(tape, g, node.input[0], int(axis) % len(shape), picked)
    return only(node, g)


def _spread(tape: Tape, g: str, x: str, axis: int, picked: range) -> str:
    """Put the slices of g at the indices `picked` along an axis of x, zeros elsewhere."""
    size, rank = tape.shapes[x][axis], len(tape.shapes[x])
    before, after = [0] * rank, [0] * rank
    if picked.step == 1:
        before[axis], after[axis] = picked.start, size - picked.stop
        return tape.pad(g, before, after)
    after[axis] = 1  # one slice of zeros, at index len(picked)
    source = np.full(size, len(picked))
    source[list(picked)] = np.arange(len(picked))
    return tape.op("Gather", tape.pad(g, before, after), tape.constant(source), axis=axis)


@rule("Gather")
def _gather(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    """Add each row's adjoint to the row of the table that was looked up; leave other axes to onnx-ad."""
    table, indices = node.input
    if attribute(node, "axis", 0) or tape.wants(indices) or tape.opset < 16:
        return NotImplemented
    shape = tape.shapes[table]
    places = tape.reshape(tape.op("Cast", indices, to=TensorProto.INT64), [-1, 1])
    rows = tape.reshape(str(grads[0]), [-1, *shape[1:]])
    zeros = tape.op("Expand", tape.constant(0, table), tape.constant(shape))
    return [tape.op("ScatterND", zeros, places, rows, reduction="add"), None]


@rule("Pad")
def _pad(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    x, g, mode = node.input[0], grads[0], attribute(node, "mode", "constant")
    pads = tape.value(node.input[1])
    if pads is None or mode not in ("constant", "reflect") or any(node.input[3:]):
        return NotImplemented
    before, after = pads.reshape(2, -1).tolist()
    if mode == "constant":
        return only(node, tape.pad(g, [-p for p in before], [-p for p in after]))
    if pads.min() < 0:
        return NotImplemented
    for axis, (left, right) in enumerate(zip(before, after, strict=True)):
        if left or right:
            g = _fold_back(tape, g, x, axis, left, right)
    return only(node, g)


def _fold_back(tape: Tape, g: str, x: str, axis: int, left: int, right: int) -> str:
    """Add the mirrored ends of a reflecting Pad back to the elements that they are copies of."""
    size = tape.shapes[x][axis]

    def mirrored(last: int, count: int, at: int) -> str:
        bounds = [tape.constant([v]) for v in (last, last - count if last >= count else -(2**40), axis, -1)]
        return _spread(tape, tape.op("Slice", g, *bounds), x, axis, range(at, at + count))

    total = tape.op("Slice", g, *(tape.constant([v]) for v in (left, left + size, axis)))
    if left:
        total = tape.op("Add", total, mirrored(left - 1, left, 1))
    if right:
        total = tape.op("Add", total, mirrored(left + size + right - 1, right, size - 1 - right))
    return total


@rule("ReduceSum", "ReduceMean", "GlobalAveragePool")
def _reduce(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    x, shape = node.input[0], tape.shapes[node.input[0]]
    axes: Any = attribute(node, "axes")
    if len(node.input) > 1 and node.input[1]:
        axes = tape.value(node.input[1])
        if axes is None:
            return NotImplemented
    if axes is None or not len(axes):
        if attribute(node, "noop_with_empty_axes", 0):
            return only(node, str(grads[0]))
        axes = range(2 if node.op_type == "GlobalAveragePool" else 0, len(shape))
    reduced = {int(a) % len(shape) for a in axes}
    kept = [1 if i in reduced else n for i, n in enumerate(shape)]
    g = str(grads[0]) if tuple(kept) == tape.shapes[node.output[0]] else tape.reshape(str(grads[0]), kept)
    count = 1 if node.op_type == "ReduceSum" else int(np.prod([shape[i] for i in reduced]))
    return only(node, tape.op("Expand", tape.scale(g, 1 / count, x), tape.constant(shape)))


@rule("Resize")
def _resize(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    """Resize is linear and separable: y = A x per axis, with A from ONNX Runtime's Resize of an identity matrix."""
    source, target = tape.shapes[node.input[0]], tape.shapes[node.output[0]]
    changed = [i for i, (a, b) in enumerate(zip(source, target, strict=True)) if a != b]
    if attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
        return NotImplemented
    if not set(changed) <= {len(source) - 2, len(source) - 1}:
        return NotImplemented
    keep = ("coordinate_transformation_mode", "cubic_coeff_a", "exclude_outside", "mode", "nearest_mode")
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name in keep}
    scales = tape.value(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    g = str(grads[0])
    for axis in changed:
        size, eye = target[axis], np.eye(source[axis], dtype=np.float32)[:, None]
        feeds = {"x": eye[None], "s": np.array([1, source[axis], 1, size])}
        inputs = ["x", "", "", "s"]
        if scales is not None and len(scales):
            feeds, inputs = {"x": eye[None], "s": np.array([1, 1, 1, scales[axis]], np.float32)}, ["x", "", "s"]
        matrix = tape.run_node(helper.make_node("Resize", inputs, ["y"], **attributes), feeds)[0, :, 0]
        if axis == len(source) - 1:
            g = tape.op("MatMul", g, tape.constant(matrix.T, node.input[0]))
        else:
            g = tape.op("MatMul", tape.constant(matrix, node.input[0]), g)
    return only(node, g)
