"""One rule an operator: the adjoints of a node's inputs from the adjoints of its outputs.

    y = f(x)      adj(x) = (df/dx)^T adj(y)

Every adjoint has the shape and layout of its tensor: there is one seed, and no axis for it. Shapes are static
and weights constant, so flipped kernels, Resize's matrices and pooling counts are computed here, in numpy.

Masks are HardSigmoid with a huge slope, of the node's *output*. Measured in ONNX Runtime: Sign takes six times
as long, Where with a broadcast scalar twenty times; and a Relu whose input nobody reads stays fused with its
Conv.

A rule returns one adjoint per input, None where there is none or nobody wants it. It returns NotImplemented
for a form of the operator that it does not cover; then onnx-ad's rule is tried.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

Array = NDArray[Any]
Grads = Any  # Sequence[str | None], or NotImplemented where a rule returns it
Rule = Callable[["Tape", NodeProto, Grads], Grads]
RunNode = Callable[[NodeProto, Mapping[str, Array]], Array]
RULES: dict[str, Rule] = {}
STEEP = 2.0**100  # the slope of a mask: exact in float32, and no tensor comes near its inverse


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute, strings decoded."""
    value = next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
    return value.decode() if isinstance(value, bytes) else value


@dataclass
class Tape:
    """What the rules know of the forward graph, and the adjoint nodes that they append."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, int]  # TensorProto element types
    constants: Mapping[str, TensorProto]
    opset: int
    run_node: RunNode  # one node on one set of inputs, as ONNX Runtime computes it
    taken: set[str]
    depends: set[str] = field(default_factory=set)  # tensors whose adjoint is worth computing
    nodes: list[NodeProto] = field(default_factory=list)
    initializers: dict[str, TensorProto] = field(default_factory=dict)

    def wants(self, name: str) -> bool:
        return name in self.depends

    def value(self, name: str) -> Array | None:
        """A constant's value, or None."""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def name(self, stem: str) -> str:
        """A name that the graph does not use yet."""
        candidate, count = stem, 1
        while candidate in self.taken:
            candidate, count = f"{stem}_{count}", count + 1
        self.taken.add(candidate)
        return candidate

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Append a node and return its (first) output."""
        names = [self.name(f"adj/{op_type}_{len(self.nodes)}") for _ in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, names, names[0], **attributes))
        return names[0]

    def constant(self, value: Any, like: str | None = None) -> str:
        """An initializer: of tensor `like`'s element type, or int64. Equal ones are shared."""
        dtype = np.dtype(np.int64) if like is None else helper.tensor_dtype_to_np_dtype(self.dtypes[like])
        array = np.ascontiguousarray(value, dtype=dtype).reshape(np.shape(value))
        key = f"{dtype}{array.shape}{hash(array.tobytes())}"
        if key not in self.initializers:
            self.initializers[key] = numpy_helper.from_array(array, self.name("adj/const"))
        return self.initializers[key].name

    def reshape(self, value: str, shape: Sequence[int]) -> str:
        return self.op("Reshape", value, self.constant(shape))

    def scale(self, value: str, factor: float, like: str) -> str:
        return value if factor == 1 else self.op("Mul", value, self.constant(factor, like))

    def sum(self, value: str, axes: Sequence[int]) -> str:
        return self.op("ReduceSum", value, self.constant(axes), keepdims=1)

    def mean(self, value: str, axes: Sequence[int]) -> str:
        if self.opset >= 18:
            return self.op("ReduceMean", value, self.constant(axes), keepdims=1)
        return self.op("ReduceMean", value, axes=list(axes), keepdims=1)

    def pad(self, value: str, begin: Sequence[int], end: Sequence[int]) -> str:
        """Zero padding; negative widths crop."""
        return value if not any((*begin, *end)) else self.op("Pad", value, self.constant([*begin, *end]))

    def unbroadcast(self, value: str, source: Sequence[int], target: str) -> str:
        """Sum an adjoint of shape `source` over the axes along which `target` was broadcast."""
        shape = self.shapes[target]
        padded = (1,) * (len(source) - len(shape)) + shape
        axes = [i for i, (have, want) in enumerate(zip(source, padded, strict=True)) if have != want]
        reduced = self.sum(value, axes) if axes else value
        return reduced if padded == shape else self.reshape(reduced, shape)


def rule(*op_types: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of the default domain."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(op_types, function))
        return function

    return register


def _only(node: NodeProto, value: str) -> Grads:
    """The adjoint of the first input; the others have none."""
    return [value] + [None] * (len(node.input) - 1)


# --- elementwise -------------------------------------------------------------------------------------------


@rule("Identity", "Dropout", "Floor", "Ceil", "Round", "Sign", "Cast")
def _pass_on(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    if node.op_type in ("Identity", "Dropout"):
        return _only(node, str(grads[0]))
    if node.op_type == "Cast":
        return [tape.op("Cast", str(grads[0]), to=tape.dtypes[node.input[0]])]
    return [None]


@rule("Add", "Sum", "Sub", "Mul", "Div")
def _arithmetic(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    g, y, shape = str(grads[0]), node.output[0], tape.shapes[node.output[0]]

    def partial(index: int) -> str:
        if node.op_type == "Mul":
            return tape.op("Mul", g, node.input[1 - index])
        if node.op_type == "Div":
            quotient = tape.op("Div", g, node.input[1])
            return quotient if index == 0 else tape.op("Neg", tape.op("Mul", quotient, y))
        return tape.op("Neg", g) if node.op_type == "Sub" and index == 1 else g

    return [
        tape.unbroadcast(partial(i), shape, name) if tape.wants(name) else None for i, name in enumerate(node.input)
    ]


@rule("Neg", "Relu", "Sigmoid", "Tanh", "Exp", "Sqrt", "HardSigmoid", "HardSwish", "LeakyRelu")
def _unary(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    g, x, y = str(grads[0]), node.input[0], node.output[0]
    if node.op_type == "Neg":
        return [tape.op("Neg", g)]
    return [tape.op("Mul", g, _SLOPES[node.op_type](tape, node, x, y))]


def _positive(tape: Tape, value: str) -> str:
    """1 where value > 0 and 0 elsewhere."""
    return tape.op("HardSigmoid", value, alpha=STEEP, beta=0.0)


def _inside(tape: Tape, y: str, low: float, high: float) -> str:
    """1 where low < y < high and 0 elsewhere, for y already clipped to [low, high]."""
    above = y if low == 0 else tape.op("Sub", y, tape.constant(low, y))
    below = tape.op("Sub", tape.constant(high, y), y)
    return _positive(tape, tape.op("Mul", above, below))


def _hard_swish_slope(tape: Tape, x: str) -> str:
    gate = tape.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    return tape.op("Add", gate, tape.op("Mul", tape.scale(_inside(tape, gate, 0, 1), 1 / 6, x), x))


def _leaky_slope(tape: Tape, node: NodeProto, x: str) -> str:
    alpha = attribute(node, "alpha", 0.01)
    return tape.op("Add", tape.scale(_positive(tape, x), 1 - alpha, x), tape.constant(alpha, x))


def _sqrt_slope(tape: Tape, y: str) -> str:
    """1 / 2y, and 0 where y is 0: a spectrum's magnitude has no slope in silence, and must not have NaN."""
    return tape.op("Div", tape.scale(_positive(tape, y), 0.5, y), tape.op("Max", y, tape.constant(1e-12, y)))


def _one_minus(tape: Tape, value: str, like: str) -> str:
    return tape.op("Sub", tape.constant(1, like), value)


_SLOPES: dict[str, Callable[[Tape, NodeProto, str, str], str]] = {
    "Relu": lambda t, n, x, y: _positive(t, y),
    "Sigmoid": lambda t, n, x, y: t.op("Mul", y, _one_minus(t, y, y)),
    "Tanh": lambda t, n, x, y: _one_minus(t, t.op("Mul", y, y), y),
    "Exp": lambda t, n, x, y: y,
    "Sqrt": lambda t, n, x, y: _sqrt_slope(t, y),
    "HardSigmoid": lambda t, n, x, y: t.scale(_inside(t, y, 0, 1), attribute(n, "alpha", 0.2), y),
    "HardSwish": lambda t, n, x, y: _hard_swish_slope(t, x),
    "LeakyRelu": lambda t, n, x, y: _leaky_slope(t, n, x),
}


@rule("Clip")
def _clip(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    y = node.output[0]
    bounds = [tape.value(name) if name else None for name in [*node.input, "", ""][1:3]]
    if any(name and bound is None for name, bound in zip(node.input[1:], bounds, strict=False)):
        return NotImplemented
    low, high = (None if b is None else float(b) for b in bounds)
    if low is not None and high is not None:
        mask = _inside(tape, y, low, high)
    elif low is not None:
        mask = _positive(tape, y if low == 0 else tape.op("Sub", y, tape.constant(low, y)))
    elif high is not None:
        mask = _positive(tape, tape.op("Sub", tape.constant(high, y), y))
    else:
        return _only(node, str(grads[0]))
    return _only(node, tape.op("Mul", str(grads[0]), mask))


@rule("Softmax", "LogSoftmax")
def _softmax(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    g, y, axes = str(grads[0]), node.output[0], [attribute(node, "axis", -1)]
    if node.op_type == "LogSoftmax":
        return [tape.op("Sub", g, tape.op("Mul", tape.op("Exp", y), tape.sum(g, axes)))]
    weighted = tape.op("Mul", g, y)
    return [tape.op("Sub", weighted, tape.op("Mul", y, tape.sum(weighted, axes)))]


@rule("LayerNormalization")
def _layer_norm(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    """x^ = (x - mean) r with r = 1/sigma: adj(x) = r (h - mean(h) - x^ mean(h x^)), h = adj(y) * scale."""
    x, shape = node.input[0], tape.shapes[node.input[0]]
    if any(grads[1:]) or any(tape.wants(name) for name in node.input[1:]):
        return NotImplemented
    axes = list(range(attribute(node, "axis", -1) % len(shape), len(shape)))
    centred = tape.op("Sub", x, tape.mean(x, axes))
    variance = tape.mean(tape.op("Mul", centred, centred), axes)
    sigma = tape.op("Sqrt", tape.op("Add", variance, tape.constant(attribute(node, "epsilon", 1e-5), x)))
    normal = tape.op("Div", centred, sigma)
    h = tape.op("Mul", str(grads[0]), node.input[1])
    along = tape.op("Mul", normal, tape.mean(tape.op("Mul", h, normal), axes))
    return _only(node, tape.op("Div", tape.op("Sub", tape.op("Sub", h, tape.mean(h, axes)), along), sigma))


@rule("BatchNormalization")
def _batch_norm(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    scale, variance = tape.value(node.input[1]), tape.value(node.input[4])
    if scale is None or variance is None or attribute(node, "training_mode", 0):
        return NotImplemented
    factor = scale / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    rank = len(tape.shapes[node.input[0]])
    shaped = tape.constant(factor.reshape(-1, *[1] * (rank - 2)), node.input[0])
    return _only(node, tape.op("Mul", str(grads[0]), shaped))


# --- shape -------------------------------------------------------------------------------------------------


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    return _only(node, tape.reshape(str(grads[0]), tape.shapes[node.input[0]]))


@rule("Transpose")
def _transpose(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    rank = len(tape.shapes[node.input[0]])
    perm = attribute(node, "perm") or list(reversed(range(rank)))
    return [tape.op("Transpose", str(grads[0]), perm=[int(i) for i in np.argsort(perm)])]


@rule("Expand")
def _expand(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    return _only(node, tape.unbroadcast(str(grads[0]), tape.shapes[node.output[0]], node.input[0]))


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
    return _only(node, tape.op("Concat", *parts, axis=attribute(node, "axis", 0)))


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
    return _only(node, g)


def _spread(tape: Tape, g: str, x: str, axis: int, picked: range) -> str:
    """Put g's slices at the places `picked` along an axis of x, zeros elsewhere."""
    size, rank = tape.shapes[x][axis], len(tape.shapes[x])
    before, after = [0] * rank, [0] * rank
    if picked.step == 1:
        before[axis], after[axis] = picked.start, size - picked.stop
        return tape.pad(g, before, after)
    after[axis] = 1  # one slice of zeros, at index len(picked)
    source = np.full(size, len(picked))
    source[list(picked)] = np.arange(len(picked))
    return tape.op("Gather", tape.pad(g, before, after), tape.constant(source), axis=axis)


@rule("Pad")
def _pad(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    x, g, mode = node.input[0], grads[0], attribute(node, "mode", "constant")
    pads = tape.value(node.input[1])
    if pads is None or mode not in ("constant", "reflect") or any(node.input[3:]):
        return NotImplemented
    before, after = pads.reshape(2, -1).tolist()
    if mode == "constant":
        return _only(node, tape.pad(g, [-p for p in before], [-p for p in after]))
    if pads.min() < 0:
        return NotImplemented
    for axis, (left, right) in enumerate(zip(before, after, strict=True)):
        if left or right:
            g = _fold_back(tape, g, x, axis, left, right)
    return _only(node, g)


def _fold_back(tape: Tape, g: str, x: str, axis: int, left: int, right: int) -> str:
    """What a reflecting Pad copied out along an axis, reversed and added to where it came from."""
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
            return _only(node, str(grads[0]))
        axes = range(2 if node.op_type == "GlobalAveragePool" else 0, len(shape))
    reduced = {int(a) % len(shape) for a in axes}
    kept = [1 if i in reduced else n for i, n in enumerate(shape)]
    g = str(grads[0]) if tuple(kept) == tape.shapes[node.output[0]] else tape.reshape(str(grads[0]), kept)
    count = 1 if node.op_type == "ReduceSum" else int(np.prod([shape[i] for i in reduced]))
    return _only(node, tape.op("Expand", tape.scale(g, 1 / count, x), tape.constant(shape)))


@rule("Resize")
def _resize(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    """Resize is linear and separable: per axis, y = A x. A is read off from ONNX Runtime on an identity."""
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
    return _only(node, g)


# --- products ----------------------------------------------------------------------------------------------


def _transposed(tape: Tape, name: str) -> str:
    """The last two axes swapped; of a constant, now."""
    value = tape.value(name)
    if value is not None:
        return tape.constant(np.swapaxes(value, -1, -2), name)
    rank = len(tape.shapes[name])
    return tape.op("Transpose", name, perm=[*range(rank - 2), rank - 1, rank - 2])


@rule("MatMul")
def _matmul(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    (a, b), g = node.input, str(grads[0])
    shape_a, shape_b = tape.shapes[a], tape.shapes[b]
    if min(len(shape_a), len(shape_b)) < 2:
        return NotImplemented
    batch = tape.shapes[node.output[0]][:-2]
    left = right = None
    if tape.wants(a):
        product = tape.op("MatMul", g, _transposed(tape, b))
        left = tape.unbroadcast(product, (*batch, *shape_a[-2:]), a)
    if tape.wants(b):
        product = tape.op("MatMul", _transposed(tape, a), g)
        right = tape.unbroadcast(product, (*batch, *shape_b[-2:]), b)
    return [left, right]


@rule("Gemm")
def _gemm(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    (a, b), g = node.input[:2], str(grads[0])
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    turn_a, turn_b = attribute(node, "transA", 0), attribute(node, "transB", 0)
    result: list[str | None] = [None] * len(node.input)
    if tape.wants(a):  # A = op(B) G^T if A was transposed, G op(B)^T if not
        pair = (b, g) if turn_a else (g, b)
        turns = {"transA": turn_b, "transB": 1} if turn_a else {"transA": 0, "transB": 1 - turn_b}
        result[0] = tape.op("Gemm", *pair, alpha=alpha, **turns)
    if tape.wants(b):
        pair = (g, a) if turn_b else (a, g)
        turns = {"transA": 1, "transB": turn_a} if turn_b else {"transA": 1 - turn_a, "transB": 0}
        result[1] = tape.op("Gemm", *pair, alpha=alpha, **turns)
    if len(result) > 2 and tape.wants(node.input[2]):
        result[2] = tape.unbroadcast(tape.scale(g, beta, a), tape.shapes[node.output[0]], node.input[2])
    return result


@dataclass(frozen=True)
class _Window:
    """How a convolution or pooling walks its input, per spatial axis."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]  # padding before the first element

    @property
    def reach(self) -> tuple[int, ...]:
        return tuple((k - 1) * d for k, d in zip(self.kernel, self.dilations, strict=True))

    @classmethod
    def of(cls, node: NodeProto, source: Sequence[int], target: Sequence[int], kernel: Sequence[int]) -> "_Window":
        rank = len(kernel)
        strides = tuple(attribute(node, "strides") or [1] * rank)
        dilations = tuple(attribute(node, "dilations") or [1] * rank)
        begins = list(attribute(node, "pads") or [0] * 2 * rank)[:rank]
        mode = attribute(node, "auto_pad", "NOTSET")
        if mode.startswith("SAME"):
            wide = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
            needed = [max((t - 1) * s + w - n, 0) for t, s, w, n in zip(target, strides, wide, source, strict=True)]
            begins = [(n + (mode == "SAME_LOWER")) // 2 for n in needed]
        return cls(tuple(source), tuple(target), tuple(kernel), strides, dilations, tuple(begins))


@rule("Conv")
def _conv(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    x, w = node.input[0], tape.value(node.input[1])
    if w is None or (len(node.input) > 2 and tape.wants(node.input[2])):
        return NotImplemented
    window = _Window.of(node, tape.shapes[x][2:], tape.shapes[node.output[0]][2:], w.shape[2:])
    return _only(node, _conv_adjoint(tape, str(grads[0]), x, w, attribute(node, "group", 1), window))


def _conv_adjoint(tape: Tape, g: str, x: str, w: Array, group: int, window: _Window) -> str:
    """The adjoint of a Conv: a Conv where the stride is 1, else a ConvTranspose.

    Depthwise with a stride is the exception: there ONNX Runtime's Conv over inserted zeros is the faster.
    """
    begin = [r - b for r, b in zip(window.reach, window.begins, strict=True)]
    end = [n - (t - 1) * s - 1 - b + r for n, t, s, b, r in
           zip(window.source, window.target, window.strides, begin, window.reach, strict=True)]  # fmt: skip
    if min(*begin, *end) < 0 or (max(window.strides) > 1 and group != w.shape[0]):
        return _conv_transposed(tape, g, x, w, group, window)
    if max(window.strides) > 1:
        ones = np.ones((w.shape[0], 1, *[1] * len(window.kernel)))
        g = tape.op("ConvTranspose", g, tape.constant(ones, x), group=w.shape[0], strides=window.strides)
    m, spatial = w.shape[0], w.shape[2:]
    swapped = w.reshape(group, m // group, -1, *spatial).swapaxes(1, 2).reshape(-1, m // group, *spatial)
    kernel = tape.constant(np.flip(swapped, tuple(range(2, w.ndim))), x)
    return tape.op(
        "Conv", g, kernel, group=group, kernel_shape=window.kernel, dilations=window.dilations, pads=[*begin, *end]
    )


def _conv_transposed(tape: Tape, g: str, x: str, w: Array, group: int, window: _Window) -> str:
    ends = [(t - 1) * s + r + 1 - b - n for n, t, s, b, r in
            zip(window.source, window.target, window.strides, window.begins, window.reach, strict=True)]  # fmt: skip
    return tape.op(
        "ConvTranspose", g, tape.constant(w, x), group=group, kernel_shape=window.kernel,
        strides=window.strides, dilations=window.dilations,
        pads=[*window.begins, *(max(e, 0) for e in ends)], output_padding=[max(-e, 0) for e in ends],
    )  # fmt: skip


@rule("ConvTranspose")
def _conv_transpose(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    """The adjoint of a ConvTranspose is the Conv with the same weights."""
    x, w = node.input[0], tape.value(node.input[1])
    if w is None or (len(node.input) > 2 and tape.wants(node.input[2])):
        return NotImplemented
    rank = w.ndim - 2
    source, target = tape.shapes[x][2:], tape.shapes[node.output[0]][2:]
    strides = attribute(node, "strides") or [1] * rank
    dilations = attribute(node, "dilations") or [1] * rank
    if attribute(node, "auto_pad", "NOTSET") != "NOTSET" or attribute(node, "output_shape"):
        return NotImplemented
    begins = (attribute(node, "pads") or [0] * 2 * rank)[:rank]
    ends = [
        s * (n - 1) + (k - 1) * d + 1 - b - t
        for s, n, k, d, b, t in zip(strides, source, w.shape[2:], dilations, begins, target, strict=True)
    ]
    g = tape.pad(str(grads[0]), [0] * w.ndim, [0, 0, *(min(e, 0) for e in ends)])
    return _only(
        node,
        tape.op(
            "Conv", g, node.input[1], group=attribute(node, "group", 1), kernel_shape=w.shape[2:],
            strides=strides, dilations=dilations, pads=[*begins, *(max(e, 0) for e in ends)],
        ),
    )  # fmt: skip


@rule("AveragePool")
def _average_pool(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    """Divide by how many elements each window holds, then a depthwise Conv of ones, transposed."""
    x, shape = node.input[0], tape.shapes[node.input[0]]
    window = _Window.of(node, shape[2:], tape.shapes[node.output[0]][2:], attribute(node, "kernel_shape"))
    size, counts, g = float(np.prod(window.kernel)), _coverage(window), str(grads[0])
    if attribute(node, "count_include_pad", 0):
        if attribute(node, "ceil_mode", 0):
            return NotImplemented
        counts = np.full_like(counts, size)
    if np.any(counts != size):
        g, size = tape.op("Mul", g, tape.constant(1 / counts, x)), 1.0
    ones = np.full((shape[1], 1, *window.kernel), 1 / size)
    return [_conv_adjoint(tape, g, x, ones, shape[1], window)]


def _coverage(window: _Window) -> Array:
    """How many real elements each pooling window sees."""
    coverage = np.ones((), np.float64)
    for n, t, k, s, d, b in zip(
        window.source, window.target, window.kernel, window.strides, window.dilations, window.begins, strict=True
    ):
        places = np.arange(t)[:, None] * s + np.arange(k) * d - b
        coverage = np.multiply.outer(coverage, np.sum((places >= 0) & (places < n), axis=1))
    return coverage


@rule("MaxPool")
def _max_pool(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    """Each window's adjoint goes to its largest element, which MaxPool itself can name."""
    x, g = node.input[0], grads[0]
    if attribute(node, "storage_order", 0):
        return NotImplemented
    tape.op("MaxPool", x, outputs=2, **{a.name: helper.get_attribute_value(a) for a in node.attribute})
    places = tape.reshape(tape.nodes[-1].output[1], [-1])
    zeros = tape.reshape(tape.op("HardSigmoid", x, alpha=0.0, beta=0.0), [-1])
    sums = tape.op("ScatterElements", zeros, places, tape.reshape(g, [-1]), reduction="add")
    return [tape.reshape(sums, tape.shapes[x])]
