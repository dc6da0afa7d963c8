"""Broken models made from good ones: the program writes a model that loads, or says in a line why not.

    python tests/fuzz_models.py --count 10000 --seed 0 [--jobs 2]

Mutates bytes and protobuf fields of small models (below), of the bundled and of the zoo's models, and runs the command
line on each in a process apart; for the zoo's, which take long, all up to the measurement. A fault is a traceback, a
death by a signal, a run of over a minute, or an output that ONNX Runtime does not load. Prints counts, and faults with
the number that makes them again: `--only NUMBER --keep FOLDER`.
"""

import argparse
import contextlib
import io
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, numpy_helper, parser

sys.path.append(str(Path(__file__).parent.parent))  # for `tests`; behind the installed package

from rdoq_onnx import cli
from tests import fuzzing

ROOT = Path(__file__).parent.parent
ZOO = ROOT.parent / "shared" / "zoo"
LARGE = 0.05  # share of mutants that are made from bundled and zoo models
OPTIONS = ("--effort", "fast", "--samples", "6", "--threads", "1", "--quiet")
UP_TO_THE_MEASUREMENT = ("--exclude", ".*")

SMALL = (
    """(float[N, 6] x) => (float[N, 3] y)
       { a = MatMul (x, w1) b = Add (a, b1) c = Relu (b) y = Gemm <transB = 1> (c, w2, b2) }""",
    """(float[N, 2, 6, 6] x) => (float[N, 3, 1, 1] y)
       { a = Conv <pads = [1, 1, 1, 1]> (x, k1, b1) b = Clip (a, low, high) c = Conv <group = 4> (b, k2)
         d = MaxPool <kernel_shape = [2, 2]> (c) e = Conv (d, k3) y = GlobalAveragePool (e) }""",
    """(int64[N, 5] x) => (float[N, 5, 4] y)
       { e = Gather (t, x) a = MatMul (e, w3) b = Softmax (a) c = MatMul (b, w4) y = Add (c, e) }""",
    """(float[2, 6] x, bool p) => (float[2, 4] y)
       { a = MatMul (x, w1) y = If (p) <then_branch = g1 () => (float[2, 4] t) { t = Relu (a) },
         else_branch = g2 () => (float[2, 4] s) { s = Gemm (a, w3) }> }""",
    """(float[N, 3, 5] x) => (float[N, 2, 11] y)
       { a = ConvTranspose <strides = [2]> (x, k4) b = Sigmoid (a) y = Mul (a, b) }""",
)
WEIGHTS = {
    "w1": (6, 4),
    "b1": (4,),
    "w2": (3, 4),
    "b2": (3,),
    "w3": (4, 4),
    "w4": (4, 4),
    "t": (7, 4),
    "k1": (4, 2, 3, 3),
    "k2": (4, 1, 3, 3),
    "k3": (3, 4, 2, 2),
    "k4": (3, 2, 3),
}
ODD_NUMBERS = (0, 1, -1, 2, 3, 7, -7, 64, 1 << 40, 1 << 31, -(1 << 31), (1 << 63) - 1, -(1 << 63))
ODD_NAMES = ("", "x", "y", "a", "w1", "../../etc/passwd", "\u2603", "n" * 5000, "a\nb", "%s{0}", "'")
OPS = (
    "Relu",
    "Conv",
    "MatMul",
    "Gemm",
    "Identity",
    "Constant",
    "If",
    "Reshape",
    "Transpose",
    "Cast",
    "QuantizeLinear",
    "BatchNormalization",
    "Dropout",
    "Concat",
    "Split",
    "LSTM",
    "Nonsense",
)


def small_models() -> list[ModelProto]:
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in WEIGHTS.items()}
    values |= {"low": np.array(0, np.float32), "high": np.array(1.5, np.float32)}
    models = []
    for text in SMALL:
        model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {text}')
        used = set(re.findall(r"\w+", text))
        model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in values.items() if n in used)
        models.append(model)
    return models


def large_models() -> list[Path]:
    return sorted([*(ROOT / "models").glob("*.onnx"), *ZOO.rglob("*.onnx")])


# --- mutations ---


def mutant(number: int, seed: int, small: list[ModelProto], large: list[Path]) -> tuple[bytes, bool]:
    """The file of mutant `number`, one to three mutations of one model, and whether it is quick to quantize."""
    rng = np.random.default_rng([seed, number])
    model, quick = ModelProto(), True
    if large and rng.random() < LARGE:
        path = large[rng.integers(len(large))]
        model.ParseFromString(path.read_bytes())
        quick = not path.is_relative_to(ZOO)
    else:
        model.CopyFrom(small[rng.integers(len(small))])
    for _ in range(rng.integers(1, 4)):
        with contextlib.suppress(Exception):  # a mutation of what an earlier one left may fail
            FIELDS[rng.integers(len(FIELDS))](model, rng)
    data = model.SerializeToString()
    return _bytes(data, rng) if rng.random() < 0.25 else data, quick


def _bytes(data: bytes, rng: np.random.Generator) -> bytes:
    kind, at = rng.integers(4), int(rng.integers(len(data) + 1))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + rng.bytes(int(rng.integers(1, 9))) + data[at:]
    if kind == 2:
        return data[:at] + data[at + int(rng.integers(1, 65)) :]
    changed = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        if changed:
            changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
    return bytes(changed)


def _pick(items: Any, rng: np.random.Generator) -> Any:
    return items[int(rng.integers(len(items)))]


def _any_name(model: ModelProto, rng: np.random.Generator) -> str:
    node = _pick(model.graph.node, rng)
    known = [*node.input, *node.output, *(t.name for t in model.graph.initializer)]
    return str(_pick(ODD_NAMES if rng.random() < 0.3 else known, rng))


def _rename_input(model: ModelProto, rng: np.random.Generator) -> None:
    node = _pick(model.graph.node, rng)
    node.input[int(rng.integers(len(node.input)))] = _any_name(model, rng)


def _rename_output(model: ModelProto, rng: np.random.Generator) -> None:
    node = _pick(model.graph.node, rng)
    node.output[int(rng.integers(len(node.output)))] = _any_name(model, rng)


def _drop_node(model: ModelProto, rng: np.random.Generator) -> None:
    del model.graph.node[int(rng.integers(len(model.graph.node)))]


def _double_node(model: ModelProto, rng: np.random.Generator) -> None:
    model.graph.node.add().CopyFrom(_pick(model.graph.node, rng))


def _other_operator(model: ModelProto, rng: np.random.Generator) -> None:
    node = _pick(model.graph.node, rng)
    if rng.random() < 0.2:
        node.domain = _pick(("com.microsoft", "ai.onnx.ml", "ai.onnx", "custom"), rng)
    else:
        node.op_type = _pick(OPS, rng)


def _attribute(model: ModelProto, rng: np.random.Generator) -> None:
    node = _pick([n for n in model.graph.node if n.attribute], rng)
    found = _pick(node.attribute, rng)
    if rng.random() < 0.2:
        node.attribute.remove(found)
    elif found.ints:
        found.ints[int(rng.integers(len(found.ints)))] = _pick(ODD_NUMBERS, rng)
    elif found.type == AttributeProto.INT:
        found.i = _pick(ODD_NUMBERS, rng)
    elif found.type == AttributeProto.STRING:
        found.s = rng.bytes(4)
    elif found.type == AttributeProto.GRAPH and found.g.node:
        inner = ModelProto()
        inner.graph.CopyFrom(found.g)
        FIELDS[rng.integers(len(FIELDS))](inner, rng)
        found.g.CopyFrom(inner.graph)
    else:
        found.type = int(rng.integers(0, 15))


def _new_attribute(model: ModelProto, rng: np.random.Generator) -> None:
    name = _pick(("strides", "pads", "dilations", "group", "transA", "axis", "kernel_shape", "value", "auto_pad"), rng)
    numbers = [_pick(ODD_NUMBERS, rng) for _ in range(rng.integers(0, 5))]
    kind = AttributeProto.INTS if rng.random() < 0.6 else AttributeProto.INT
    node: NodeProto = _pick(model.graph.node, rng)
    node.attribute.add(name=name, type=kind, ints=numbers, i=_pick(ODD_NUMBERS, rng))


def _dims(model: ModelProto, rng: np.random.Generator) -> None:
    tensor = _pick(model.graph.initializer, rng)
    kind = rng.integers(3)
    if kind == 0 and tensor.dims:
        tensor.dims[int(rng.integers(len(tensor.dims)))] = _pick(ODD_NUMBERS, rng)
    elif kind == 1:
        tensor.dims.append(_pick(ODD_NUMBERS, rng))
    else:
        del tensor.dims[:]


def _values(model: ModelProto, rng: np.random.Generator) -> None:
    tensor = _pick(model.graph.initializer, rng)
    array = numpy_helper.to_array(tensor).copy()
    kind = rng.integers(4)
    if kind == 0:
        array.reshape(-1)[int(rng.integers(array.size))] = _pick((np.nan, np.inf, -np.inf, 1e38, 1e-42), rng)
    elif kind == 1:
        array[...] = 0
    elif kind == 2:
        array = array.astype(_pick((np.float16, np.float64, np.int32, np.int8), rng))
    else:
        array = array[:0] if array.ndim else array
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _type(model: ModelProto, rng: np.random.Generator) -> None:
    tensor = _pick(model.graph.initializer, rng)
    tensor.data_type = int(rng.integers(0, 28))


def _external(model: ModelProto, rng: np.random.Generator) -> None:
    tensor = _pick(model.graph.initializer, rng)
    tensor.data_location = TensorProto.EXTERNAL
    where = _pick(("/etc/passwd", "../x", "in.onnx", "", "absent", "/dev/zero", "."), rng)
    tensor.external_data.add(key="location", value=where)
    tensor.external_data.add(key=_pick(("offset", "length"), rng), value=str(_pick(ODD_NUMBERS, rng)))
    if rng.random() < 0.5:
        tensor.ClearField("raw_data")


def _drop_initializer(model: ModelProto, rng: np.random.Generator) -> None:
    del model.graph.initializer[int(rng.integers(len(model.graph.initializer)))]


def _double_initializer(model: ModelProto, rng: np.random.Generator) -> None:
    model.graph.initializer.add().CopyFrom(_pick(model.graph.initializer, rng))


def _interface(model: ModelProto, rng: np.random.Generator) -> None:
    value = _pick([*model.graph.input, *model.graph.output], rng)
    kind = rng.integers(6)
    tensor = value.type.tensor_type
    if kind == 0:
        value.name = _any_name(model, rng)
    elif kind == 1:
        tensor.elem_type = int(rng.integers(0, 28))
    elif kind == 2 and tensor.shape.dim:
        _pick(tensor.shape.dim, rng).dim_value = _pick(ODD_NUMBERS, rng)
    elif kind == 3:
        tensor.ClearField("shape")
    elif kind == 4:
        value.ClearField("type")
    else:
        tensor.shape.dim.add().dim_value = _pick(ODD_NUMBERS, rng)


def _more_outputs(model: ModelProto, rng: np.random.Generator) -> None:
    model.graph.output.add().CopyFrom(_pick([*model.graph.input, *model.graph.output], rng))
    if rng.random() < 0.5:
        model.graph.output[-1].name = _any_name(model, rng)


def _versions(model: ModelProto, rng: np.random.Generator) -> None:
    if rng.random() < 0.5:
        model.ir_version = int(_pick((0, 1, 3, 4, 7, 9, 10, 13, 14, 99, -1), rng))
    elif model.opset_import:
        model.opset_import[0].version = int(_pick((0, 1, 6, 7, 9, 11, 12, 13, 18, 20, 21, 25, 28, 29, 99, -1), rng))
    else:
        model.opset_import.add(domain="", version=17)


def _opsets(model: ModelProto, rng: np.random.Generator) -> None:
    if rng.random() < 0.5:
        del model.opset_import[:]
    else:
        model.opset_import.add(domain=_pick(("", "ai.onnx", "com.microsoft", "custom"), rng), version=1)


FIELDS: tuple[Callable[[ModelProto, np.random.Generator], None], ...] = (
    _rename_input,
    _rename_output,
    _drop_node,
    _double_node,
    _other_operator,
    _attribute,
    _new_attribute,
    _dims,
    _values,
    _type,
    _external,
    _drop_initializer,
    _double_initializer,
    _interface,
    _more_outputs,
    _versions,
    _opsets,
)


# --- runs ---


def run(data: bytes, quick: bool, folder: Path) -> tuple[str, str]:
    """(outcome, what it said) of the command line on a file: "emitted", "exit N" or a fault."""
    source, target = folder / "in.onnx", folder / "out.onnx"
    source.write_bytes(data)
    target.unlink(missing_ok=True)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            cli.main([str(source), str(target), *OPTIONS, *(() if quick else UP_TO_THE_MEASUREMENT)])
    except SystemExit as stop:
        if stop.code:
            message = said.getvalue().strip()
            plain = "\n" not in message and message.startswith("rdoq-onnx: error: ")
            fault = "" if plain and not target.exists() else "FAULT more than one line, or output written: "
            return fault + f"exit {stop.code}", message
    except BaseException:
        return "FAULT traceback", traceback.format_exc()
    try:
        ort.InferenceSession(target.read_bytes(), providers=["CPUExecutionProvider"])
    except Exception as error:
        return "FAULT output does not load", str(error)
    return "emitted", ""


def outcomes(count: int, seed: int, jobs: int, first: int = 0) -> Iterator[tuple[int, str, str]]:
    """(number, outcome, what it said) of all mutants."""
    small, large = small_models(), large_models()

    def case(number: int, folder: Path) -> tuple[str, str]:
        return run(*mutant(number, seed, small, large), folder)

    return fuzzing.outcomes(case, range(first, first + count), jobs)


def main() -> int:
    options = argparse.ArgumentParser(description="Fuzz the command line with broken models.")
    options.add_argument("--count", type=int, default=10000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--only", type=int)
    options.add_argument("--keep", type=Path)
    given = options.parse_args()
    if given.keep is not None and given.only is not None:
        data, _ = mutant(given.only, given.seed, small_models(), large_models())
        (given.keep / f"mutant_{given.only}.onnx").write_bytes(data)
    first, count = (given.only, 1) if given.only is not None else (0, given.count)
    found = outcomes(count, given.seed, given.jobs if count > 1 else 1, first)
    return fuzzing.counted(f"mutants, seed {given.seed}", found, all_of_them=count == 1)


if __name__ == "__main__":
    sys.exit(main())
