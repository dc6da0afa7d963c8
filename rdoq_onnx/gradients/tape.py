"""The tape that adjoint rules append nodes to, and the table of rules, one per operator.

    y = f(x)      adj(x) = (df/dx)ᵀ adj(y)

Every adjoint has the shape and layout of its tensor, without a seed axis, since there is one seed. Shapes are static
and weights constant, so the rules compute flipped kernels, Resize matrices and pooling counts in numpy.

A rule returns one adjoint per input, None where there is none or none is wanted. It returns NotImplemented for a form
of the operator that it does not cover; then onnx-ad's rule is tried.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from rdoq_onnx.model import external

Array = NDArray[Any]
Grads = Any  # Sequence[str | None]; a rule may return NotImplemented
Rule = Callable[["Tape", NodeProto, Grads], Grads]
RunNode = Callable[[NodeProto, Mapping[str, Array]], Array]
RULES: dict[str, Rule] = {}


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """Return the value of a node's attribute, with strings decoded."""
    value = next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
    return value.decode() if isinstance(value, bytes) else value


@dataclass
class Tape:
    """The rules' view of the forward graph, and the adjoint nodes that they append."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, int]  # TensorProto element types
    constants: Mapping[str, TensorProto]
    opset: int
    run_node: RunNode  # runs one node on one set of inputs in ONNX Runtime
    taken: set[str]
    depends: set[str] = field(default_factory=set)  # tensors whose adjoint is needed
    straight: bool = False  # Round passes adjoints on unchanged, the straight-through estimator
    masked: frozenset[str] = frozenset()  # tensors whose adjoint already includes their Relu's mask (relu_masks.py)
    nodes: list[NodeProto] = field(default_factory=list)
    initializers: dict[str, TensorProto] = field(default_factory=dict)

    def wants(self, name: str) -> bool:
        return name in self.depends

    def value(self, name: str) -> Array | None:
        """Return a constant's value, or None."""
        return external.values(self.constants[name]) if name in self.constants else None

    def detached(self, name: str) -> bool:
        """Whether `name` is a constant whose values stay in a file."""
        return name in self.constants and external.Place.of(self.constants[name]) is not None

    def name(self, stem: str) -> str:
        """Return and reserve a name that the graph does not use yet."""
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
        """Add an initializer of the element type of `like`, or int64; equal ones are shared."""
        dtype = np.dtype(np.int64) if like is None else helper.tensor_dtype_to_np_dtype(self.dtypes[like])
        array = np.ascontiguousarray(value, dtype=dtype).reshape(np.shape(value))
        key = f"{dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"
        if key not in self.initializers:
            self.initializers[key] = numpy_helper.from_array(array, self.name("adj/const"))
        return self.initializers[key].name

    def reshape(self, value: str, shape: Sequence[int]) -> str:
        return self.op("Reshape", value, self.constant(shape))

    def inner(self, one: str, other: str, like: str) -> str:
        """Append the inner product of two tensors of one shape, in the shape of `like`, which has one element."""
        # Ten times as fast in ONNX Runtime as a MatMul of a row and a column.
        product = self.op("Gemm", self.reshape(one, [1, -1]), self.reshape(other, [1, -1]), transB=1)
        return self.reshape(product, self.shapes[like])

    def scale(self, value: str, factor: float, like: str) -> str:
        return value if factor == 1 else self.op("Mul", value, self.constant(factor, like))

    def sum(self, value: str, axes: Sequence[int]) -> str:
        return self.op("ReduceSum", value, self.constant(axes), keepdims=1)

    def mean(self, value: str, axes: Sequence[int]) -> str:
        if self.opset >= 18:
            return self.op("ReduceMean", value, self.constant(axes), keepdims=1)
        return self.op("ReduceMean", value, axes=list(axes), keepdims=1)

    def pad(self, value: str, begin: Sequence[int], end: Sequence[int]) -> str:
        """Pad with zeros; negative widths crop."""
        return value if not any((*begin, *end)) else self.op("Pad", value, self.constant([*begin, *end]))

    def unbroadcast(self, value: str, source: Sequence[int], target: str) -> str:
        """Sum an adjoint of shape `source` over the axes along which `target` was broadcast."""
        shape = self.shapes[target]
        padded = (1,) * (len(source) - len(shape)) + shape
        axes = [i for i, (size, target_size) in enumerate(zip(source, padded, strict=True)) if size != target_size]
        reduced = self.sum(value, axes) if axes else value
        return reduced if padded == shape else self.reshape(reduced, shape)


def rule(*op_types: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators by their names, as `operator` gives them."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(op_types, function))
        return function

    return register


def operator(node: NodeProto) -> str:
    """Return the type of a standard operator, and domain and type, joined by a dot, of any other."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def only(node: NodeProto, value: str) -> Grads:
    """Return `value` as the adjoint of the first input and none for the others."""
    return [value] + [None] * (len(node.input) - 1)
