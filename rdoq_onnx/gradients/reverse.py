"""Reverse mode over a float ONNX graph: g = J^T v at chosen tensors, one pass for all of them.

Supplement of RDO-Q, Fig. 1: an Add with a parameter s = 0 follows each chosen tensor a, and every consumer of a reads
a + s. The adjoint of s is the total adjoint of a,

    adj(a) = sum over the consumers y = f(a, ...) of (df/da)^T adj(y),   adj(output) = its seed v,

so no Add needs to be inserted: the backward walk computes adj(a) anyway. Samples do not interact and v is independent
for each sample, so one pass over a batch gives each sample's own g. Rules for common operators are in elementwise.py,
products.py and shapes.py; any other operator goes to onnx-ad, one node at a time (foreign.py).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from rdoq_onnx.gradients import elementwise, packed_products, products  # noqa: F401 - importing registers rules
from rdoq_onnx.gradients import shapes as movement  # noqa: F401 - likewise
from rdoq_onnx.gradients.foreign import foreign
from rdoq_onnx.gradients.opened import opened
from rdoq_onnx.gradients.relu_masks import masked, masked_tensors
from rdoq_onnx.gradients.tape import RULES, Grads, Tape, operator
from rdoq_onnx.model.graph import Graph
from rdoq_onnx.model.protos import reads, with_outputs
from rdoq_onnx.system.runtime import Runtime

Array = NDArray[Any]
Run = Callable[[onnx.ModelProto, Mapping[str, Array], Sequence[str]], Sequence[Array]]
_Ends = tuple[Sequence[str], Sequence[str]]  # tensors with seeds, and those that are only fetched
FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Reverse:
    """A graph that runs forward and backward.

    `model` takes the inputs of the original and one seed per float output; it returns the outputs, the tensors of
    `fetch` and the adjoints. Tensors with the same adjoint (the operands of an Add) share one output.
    """

    model: onnx.ModelProto
    seeds: dict[str, str] = field(default_factory=dict)  # output -> seed input, of the output's shape
    adjoints: dict[str, str] = field(default_factory=dict)  # tensor -> graph output, of the tensor's shape
    missing: dict[str, str] = field(default_factory=dict)  # tensor without an adjoint -> reason


def reverse_model(
    model: onnx.ModelProto,
    at: Sequence[str],
    outputs: Sequence[str],
    fetch: Sequence[str] = (),
    *,
    feeds: Mapping[str, Array],
    runtime: Runtime,
) -> Reverse:
    """Build the graph that computes the adjoint of every tensor of `at` from seeds on `outputs`.

    `model`, which stays as it is, has fixed input dimensions and opset 13 or later; `feeds` is one batch of its inputs.
    `runtime` folds shape arithmetic, keeping standard operators, and runs parts of the graph.
    """
    return _reversed(model, at, (outputs, fetch), feeds, runtime, straight=False)


def straight_through(
    model: onnx.ModelProto, at: Sequence[str], outputs: Sequence[str], feeds: Mapping[str, Array], runtime: Runtime
) -> Reverse:
    """Build `reverse_model` with Round passing adjoints on unchanged, as the straight-through estimator has it."""
    return _reversed(model, at, (outputs, ()), feeds, runtime, straight=True)


def _reversed(
    model: onnx.ModelProto, at: Sequence[str], ends: _Ends, feeds: Mapping[str, Array], runtime: Runtime, straight: bool
) -> Reverse:
    """Build `reverse_model`."""
    outputs, fetch = ends

    def run(model: onnx.ModelProto, feeds: Mapping[str, Array], names: Sequence[str]) -> Sequence[Array]:
        return runtime.session(model).run(feeds, names)

    model = _with_outputs(model, [*outputs, *fetch, *at])
    graph = runtime.optimized(_raise_opset(opened(model, outputs, feeds, run) if at else model))
    shapes, dtypes = _record(graph, feeds, run)
    tape = _tape(graph, shapes, dtypes, run)
    tape.masked, tape.straight = masked_tensors(Graph(graph)), straight
    seeds = {name: tape.name(f"seed/{name}") for name in dict.fromkeys(outputs) if dtypes.get(name) in FLOATS}
    grads, broken = _walk(tape, graph.graph.node, at, seeds)
    missing = {name: reason for name in at if (reason := broken.get(name) or _unfit(tape, name))}
    adjoints = _results(tape, [name for name in at if name not in missing], grads, seeds.values())
    result = _assemble(graph, tape, seeds, [*outputs, *fetch], adjoints)
    return Reverse(result, seeds, adjoints, missing)


def _unfit(tape: Tape, name: str) -> str:
    """Return why a tensor cannot have an adjoint, whatever the operators; empty if it can."""
    if name not in tape.shapes:
        return f"no tensor {name} in the graph"
    return "" if tape.dtypes[name] in FLOATS else f"tensor {name} is not of a float type"


def _with_outputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """Return a copy whose outputs are those of the named tensors that some node produces.

    Drops their declared shapes, which may be wrong, so that they are inferred again.
    """
    produced = {name for node in model.graph.node for name in node.output}
    copy = with_outputs(model, [name for name in dict.fromkeys(names) if name in produced])
    for output in copy.graph.output:
        output.ClearField("type")
    return copy


def _raise_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """Declare opsets 13 to 16 as 17, which is compatible: MaxPool's adjoint scatters with a reduction (opset 16)."""
    for imported in model.opset_import:
        if imported.domain in ("", "ai.onnx") and 13 <= imported.version < 17:
            imported.version = 17
            model.ir_version = max(model.ir_version, 8)
    return model


def _record(
    model: onnx.ModelProto, feeds: Mapping[str, Array], run: Run
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Return shape and element type of every tensor, from shape inference or, where that fails, from one run."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    dtypes = {t.name: t.data_type for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        dims = [d.dim_value for d in kind.shape.dim]
        if kind.elem_type and kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            shapes[value.name], dtypes[value.name] = tuple(dims), kind.elem_type
    unknown = [n for node in graph.node for n in node.output if n and n not in shapes]
    if unknown:
        for name, array in zip(unknown, run(_with_outputs(model, unknown), feeds, unknown), strict=True):
            array = np.asarray(array)
            shapes[name], dtypes[name] = array.shape, helper.np_dtype_to_tensor_dtype(array.dtype)
    return shapes, dtypes


def _tape(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, int], run: Run) -> Tape:
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))

    def run_node(node: NodeProto, feeds: Mapping[str, Array]) -> Array:
        inputs = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in feeds.items()
        ]
        graph = helper.make_graph([node], "node", inputs, [ValueInfoProto(name=n) for n in node.output])
        single = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        return np.asarray(run(single, feeds, list(node.output))[0])

    constants = {t.name: t for t in model.graph.initializer}
    return Tape(shapes, dtypes, constants, opset, run_node, set(shapes))


def _walk(
    tape: Tape, nodes: Sequence[NodeProto], at: Sequence[str], seeds: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Walk the nodes backward. Returns the adjoint of each tensor, and the reason for each without one."""
    tape.depends = {name for name in at if tape.dtypes.get(name) in FLOATS}
    for node in nodes:
        if any(name in tape.depends for name in reads([node])):
            tape.depends.update(name for name in node.output if tape.dtypes.get(name) in FLOATS)
    terms: dict[str, list[str]] = {name: [seed] for name, seed in seeds.items()}
    grads: dict[str, str] = {}
    broken: dict[str, str] = {}

    def take(name: str) -> str | None:
        if name in terms:
            total, *rest = terms.pop(name)
            for term in rest:
                total = tape.op("Add", total, term)
            grads[name] = total
        return grads.get(name)

    for node in reversed(nodes):
        adjoints = [take(name) for name in node.output]
        wanted = [name for name in dict.fromkeys(reads([node])) if name in tape.depends]
        reason = next((broken[name] for name in node.output if name in broken), "")
        if not wanted or not (reason or any(adjoints)):
            continue
        if not reason:
            contributions = _contributions(tape, node, adjoints)
            if contributions is not None:
                for name, term in contributions:
                    terms.setdefault(name, []).append(term)
                continue
            reason = f"no adjoint rule for operator {node.op_type} (node {node.name or node.output[0]})"
        for name in wanted:
            broken.setdefault(name, reason)
    for name in list(terms):
        take(name)
    return grads, broken


def _contributions(tape: Tape, node: NodeProto, grads: Grads) -> list[tuple[str, str]] | None:
    """Return (input, adjoint) pairs of one node, by our rule or onnx-ad's; None if neither has one."""
    result: Any = NotImplemented
    grads = masked(tape, node, grads)
    if (kind := operator(node)) in RULES:
        result = RULES[kind](tape, node, grads)
    if result is NotImplemented:
        return foreign(tape, node, grads)
    pairs = zip(node.input, result, strict=False)
    return [(name, term) for name, term in pairs if term is not None and tape.wants(name)]


def _results(tape: Tape, at: Iterable[str], grads: Mapping[str, str], seeds: Iterable[str]) -> dict[str, str]:
    """Return the graph output of each adjoint: a copy if it is a seed itself, zeros if no seed reaches the tensor."""
    copies = {seed: tape.op("Identity", seed) for seed in seeds}
    results = {}
    for name in at:
        if name in grads:
            results[name] = copies.get(grads[name], grads[name])
        else:
            results[name] = tape.op("Expand", tape.constant(0, name), tape.constant(tape.shapes[name]))
    return results


def _assemble(
    model: onnx.ModelProto,
    tape: Tape,
    seeds: Mapping[str, str],
    outputs: Sequence[str],
    adjoints: Mapping[str, str],
) -> onnx.ModelProto:
    """Assemble the forward and adjoint nodes that some output needs, in order, with their initializers."""
    graph = model.graph
    kept = list(dict.fromkeys(outputs))
    needed = {*kept, *adjoints.values()}
    nodes = []
    for node in reversed([*graph.node, *tape.nodes]):
        if any(name in needed for name in node.output):
            needed.update(reads([node]))
            nodes.append(node)
    declare = helper.make_tensor_value_info
    inputs = [*graph.input, *(declare(s, tape.dtypes[n], tape.shapes[n]) for n, s in seeds.items())]
    declared = {n: declare(n, tape.dtypes[n], tape.shapes[n]) for n in kept}
    declared.update({out: declare(out, tape.dtypes[n], tape.shapes[n]) for n, out in adjoints.items()})
    tensors = [t for t in (*graph.initializer, *tape.initializers.values()) if t.name in needed]
    assembled = helper.make_graph(nodes[::-1], graph.name, inputs, list(declared.values()), tensors)
    domains = {node.domain for node in nodes} | {""}
    imports = [o for o in model.opset_import if o.domain in domains]
    return helper.make_model(assembled, opset_imports=imports, ir_version=model.ir_version)
