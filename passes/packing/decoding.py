"""Nodes that decode what is stored in few bytes; for the passes that store it.

What is stored has names that begin with PACKED, which ShortenNames leaves: names cost bytes, but a reader of the file
finds its data by them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.surgeon import Constant, Graph, Node, Tensor, Variable

PACKED = "packed_"


@dataclass(frozen=True)
class Decoding:
    """Adds nodes to `graph`; small arrays become initializers, one for all that are equal."""

    graph: Graph
    known: dict[tuple[str, tuple[int, ...], bytes], Constant] = field(default_factory=dict)

    def constant(self, value: NDArray[np.generic]) -> Constant:
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self.known:
            self.known[key] = surgeon.constant(surgeon.fresh(self.graph, "unpack_constant"), value)
        return self.known[key]

    def packed(self, what: str, value: NDArray[np.generic]) -> Constant:
        """An initializer of its own, named for what it holds."""
        return surgeon.constant(surgeon.fresh(self.graph, PACKED + what), value)

    def op(self, kind: str, *inputs: Tensor | NDArray[np.generic], **attrs: object) -> Variable:
        """A node with one output."""
        tensors = [self.constant(i) if isinstance(i, np.ndarray) else i for i in inputs]
        return surgeon.append(self.graph, kind, tensors, f"unpack_{kind}", attrs=dict(attrs))

    def split(self, tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Parts of `tensor` along axis 0; itself if that is one part."""
        if len(sizes) == 1:
            return [tensor]
        parts: list[Tensor] = [Variable(surgeon.fresh(self.graph, "unpack_Split_out")) for _ in sizes]
        inputs = [tensor, self.constant(np.array(sizes, np.int64))]
        self.graph.nodes.append(Node("Split", surgeon.fresh(self.graph, "unpack_Split"), None, inputs, parts))
        return parts

    def reshape(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        return self.op("Reshape", tensor, np.array(shape, np.int64))

    def replace(self, old: Tensor, new: Tensor) -> None:
        """Have all that read `old` read `new`."""
        surgeon.insert_after(self.graph, old, lambda _: new)
