"""Hypothesis strategies of runs of the command line: small models of every kind, and combinations of all options.

A new option is added here: `OPTIONS` must name them all (tests/test_random_options.py).
"""

import re
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from onnx import ModelProto, numpy_helper, parser

# Each with the version of its operators.
MODELS = {
    "one layer": (17, "(float[N, 4] x) => (float[N, 4] y) { y = MatMul (x, w44) }"),
    "two layers": (
        13,
        """(float[N, 4] x) => (float[N, 3] y)
        { [m1] a = MatMul (x, w44) b = Add (a, b4) c = Relu (b) [m2] y = Gemm (c, w43) }""",
    ),
    "layers of one channel": (
        9,
        """(float[N, 1, 4, 4] x) => (float[N, 1] y)
        { a = Conv (x, k1111) b = Relu (a) c = GlobalAveragePool (b) d = Flatten (c) y = MatMul (d, w11) }""",
    ),
    "convolutions": (
        11,
        """(float[N, 2, 6, 6] x) => (float[N, 4, 1, 1] y)
        { a = Conv <pads = [1, 1, 1, 1]> (x, k4233, b4) b = Clip (a, low, high) c = Conv <group = 4> (b, k4133)
          d = BatchNormalization (c, ones4, b4, b4, ones4) e = Relu (d) y = GlobalAveragePool (e) }""",
    ),
    "transposed convolution": (
        22,
        """(float[N, 3, 5] x) => (float[N, 2, 11] y)
        { a = ConvTranspose <strides = [2]> (x, k323) b = Sigmoid (a) y = Mul (a, b) }""",
    ),
    "table only": (17, "(int64[N, 5] x) => (float[N, 5, 4] y) { y = Gather (table, x) }"),
    "table and layer": (
        18,
        """(int64[N, 5] x) => (float[N, 5, 4] y)
        { e = Gather (table, x) a = MatMul (e, w44) b = Softmax (a) y = Add (e, b) }""",
    ),
    "several outputs": (
        17,
        """(float[N, 4] x) => (float[N, 4] f, float[N, 3] y, int64[N] top, float[4] constant)
        { a = MatMul (x, w44) f = Relu (a) y = MatMul (f, w43) top = ArgMax <axis = 1, keepdims = 0> (y)
          constant = Identity (b4) }""",
    ),
    "joined parts": (
        21,
        """(float[N, 4] x) => (float[N, 7] y)
        { a = MatMul (x, w44) b = Relu (a) c = MatMul (b, w43) d = Sigmoid (c) e = Mul (b, hundred)
          y = Concat <axis = 1> (e, d) }""",
    ),
    "empty tensors": (
        17,
        """(float[N, 4] x) => (float[N, 4] y)
        { a = MatMul (x, w44) s = Slice (a, four, four, one) z = Concat <axis = 1> (s, a) r = Relu (z)
          y = MatMul (r, w44) }""",
    ),
    "layer without data": (
        17,
        """(float[N, 3, 4] x) => (float[N, 3, 4] y)
        { s = Slice (x, three, three, one) a = MatMul (s, w44) z = Concat <axis = 1> (x, a) y = MatMul (z, k44) }""",
    ),
    "residual": (
        14,
        """(float[N, 3, 4] x) => (float[N, 3, 4] y)
        { a = MatMul (x, w44) k = Transpose <perm = [0, 2, 1]> (x) q = MatMul (a, k) p = Softmax (q)
          v = MatMul (p, x) b = Add (v, x) c = MatMul (b, w44) y = Add (c, b) }""",
    ),
    "batch of two": (
        17,
        "(float[2, 4] x, bool p) => (float[2, 4] y) { a = MatMul (x, w44) b = Not (p) y = Where (b, a, x) }",
    ),
    "recurrent": (
        17,
        "(float[S, 1, 4] x) => (float[S, 1, 1, 8] y) { y, h, c = LSTM <hidden_size = 8> (x, cell, state) }",
    ),
    "nothing to quantize": (
        17,
        "(float[N, 4] x) => (float[N, 4] y) { t = Transpose (x) a = MatMul (x, t) b = MatMul (a, x) y = Relu (b) }",
    ),
    "dead layer": (
        17,
        """(float[N, 4] x) => (float[N, 4] y)
        { a = MatMul (x, zeros44) b = Relu (a) c = MatMul (b, w44) y = Add (c, b4) }""",
    ),
}

_ODD = ("nan", "inf", "-1", "", "none", "9", "0", "1e400", "two", "1e-9", "²", "9" * 30, "-", "none/such", "in.onnx")
_ODD += ("0.99", "101", "1,2", "3-2", "5-", "m", "(", "[[a]", "m=3", "=4", "a[0:9]=3", ".*[1:]=2", "much")
_BITS = ("1", "1.5", "2", "3", "4", "6", "8")
_SIZES = ("1B", "10", "40B", "0.1kB", "1KiB", "1MB")
_DECIBELS = ("-10", "0", "5", "20", "35", "90")


def _of(*values: str) -> st.SearchStrategy[tuple[str, ...]]:
    return st.sampled_from(values).map(lambda value: (value,))


_FLAG = st.just(())
# The sound values of each option of the command line, some of which contradict others; none for a flag.
OPTIONS: dict[str, st.SearchStrategy[tuple[str, ...]]] = {
    "--bits": _of(*_BITS),
    "--weight-bits": _of("0", *_BITS),
    "--activation-bits": _of(*_BITS, "none", "none", "none"),
    "--joint": _FLAG,
    "--size": _of(*_SIZES),
    "--layer-limit": _of(*_SIZES),
    "--layer-limit-activations": _FLAG,
    "--cost": _of("size", "bops", "costs.csv"),
    "--budget": _of("30%", "60%", "100%", "2k", "40"),
    "--bops": _of("50%", "5k"),
    "--latency": _of("30%", "5us"),
    "--interpolate": _FLAG,
    "--cost-template": _of("rows.csv"),
    "--sqnr": _of(*_DECIBELS),
    "--top1-agreement": _of("50", "99", "100"),
    "--widths": _of("0-8", "4", "8", "0", "2,4,8", "4-8", "1-3"),
    "--block-size": _of("0", "0,32", "16", "64"),
    "--pin": st.tuples(
        st.sampled_from(("x", "a|b|c", "w44", "w4.*", "[wk].*", ".*", "w44[0:2]", "w44[2:]")), st.integers(0, 8)
    ).map(lambda pin: (f"{pin[0]}={pin[1]}",)),
    "--exclude": _of("w44", "w4.*", "[wkt].*"),
    "--exclude-op": _of("MatMul", "MatMul", "Gemm", "Conv", "Gather"),
    "--calibration": _of("samples.npz"),
    "--validation": _of("samples.npz"),
    "--samples": _of("2", "3", "5", "9"),
    "--image-mean": _of("0.5", "0.1,0.2"),
    "--image-std": _of("0.5", "0.1,0.2"),
    "--image-scale": _of("1", "0.5"),
    "--measure": _of("taylor", "probe"),
    "--distortion": _of("mse", "kl", "auto"),
    "--effort": _of("default", "best"),
    "--target": _of("onnxruntime", "openvino", "tensorrt"),
    "--storage": _of("packed", "native", "int8", "nbits"),
    "--keep-channels": _FLAG,
    "--seed": _of("0", "1", "99999999999999999999999"),
    "--provider": _of("auto", "cpu"),
    "--minutes": _of("0.05", "1e-3"),
    "--threads": _of("0", "1", "2"),
    "--workers": _of("0"),  # an error: processes take seconds to start
    "--shard": _of("1/1", "2/3"),
    "--scratch": _of("."),
    "--memory": _of("300MB", "1GiB"),
    "--curves": _of("curves.npz"),
    "--modified": _of("modified.onnx"),
    "--json": _of("report.json"),
    "--report": _of("report.html"),
    "--min-sqnr": _of(*_DECIBELS),
    "--max-bytes": _of(*_SIZES),
    "--dry-run": _FLAG,
    "--quiet": _FLAG,
    "--verbose": _FLAG,
}
# Options that a small model without images refuses, or that hardly matter: drawn less often.
_RARE = (
    "--image-mean",
    "--image-std",
    "--image-scale",
    "--provider",
    "--workers",
    "--shard",
    "--dry-run",
    "--quiet",
    "--exclude-op",
    "--exclude",
)
_OFTEN = tuple(name for name in OPTIONS if name not in _RARE)
_COSTS = ("--budget", "--bops", "--latency")
# Of these, the first drawn is taken; tests/test_cli.py has what is said of both.
_CONTRADICTING = (
    {"--joint", "--weight-bits"},
    {"--joint", "--activation-bits"},
    {"--joint", "--size"},
    {"--size", "--sqnr", "--top1-agreement", "--budget", "--bops", "--latency"},
    {"--size", "--weight-bits"},
    *({budget, bits} for budget in _COSTS for bits in ("--bits", "--weight-bits", "--activation-bits", "--joint")),
    {"--cost", "--bops"},
    {"--cost", "--latency"},
)


@dataclass(frozen=True)
class Combination:
    """A model of `MODELS` and the options to quantize it with."""

    model: str
    options: tuple[str, ...]


@st.composite
def combinations(draw: st.DrawFn) -> Combination:
    """A model and up to seven options, most with a sound value; quick ones unless an effort is drawn."""
    options = ["--effort", "fast", "--threads", "1", "--samples", "6", "--calibration", "samples.npz"]
    for _ in range(draw(st.integers(0, 7))):
        name = draw(st.sampled_from((*4 * _OFTEN, *_RARE)))
        if any(name != other and {name, other} <= pair for pair in _CONTRADICTING for other in options):
            continue
        values = draw(OPTIONS[name])
        odd = values and draw(st.sampled_from((*24 * (False,), True)))
        options += [name, *((draw(st.sampled_from(_ODD)),) if odd else values)]
    return Combination(draw(st.sampled_from(tuple(reversed(MODELS)))), tuple(options))


def model_of(kind: str) -> ModelProto:
    """The model of `MODELS`, with weights named after their shapes."""
    opset, text = MODELS[kind]
    rng = np.random.default_rng(0)
    version = 8 if opset < 21 else 10
    model = parser.parse_model(f'<ir_version: {version}, opset_import: ["": {opset}]> g {text}')
    for letters, digits in sorted(set(re.findall(r"\b([wbk]|ones|zeros)(\d+)\b", text))):
        value = {"zeros": np.zeros, "ones": np.ones}.get(letters, rng.standard_normal)(tuple(map(int, digits)))
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), f"{letters}{digits}"))
    wide = {"table": (300, 4), "cell": (1, 32, 4), "state": (1, 32, 8)}  # smaller ones stay in float
    others = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in wide.items()}
    others |= {"low": np.float32(0), "high": np.float32(1.5), "hundred": np.float32(100)}
    others |= {name: np.array([k]) for k, name in enumerate(("zero", "one", "two", "three", "four"))}
    words = set(re.findall(r"\w+", text))
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in others.items() if n in words)
    return model


def keyword_values() -> st.SearchStrategy[object]:
    """What may be given for a keyword argument of the Python API: text, numbers, containers of them, and others."""
    texts = st.sampled_from((*_ODD, *_BITS, *_SIZES, "fast", "int8", "cpu", "0-8", "2,4", "a=3", "(=3", "True"))
    numbers = st.integers(-2, 1 << 70) | st.integers(0, 9) | st.floats() | st.sampled_from((np.int64(4), np.float32(2)))
    others = st.sampled_from((None, True, False, b"4", object(), np.arange(3), np.array("a"), range(3), {1: 2}))
    plain = texts | numbers | others
    return plain | st.lists(plain, max_size=3) | st.tuples(texts, plain) | st.dictionaries(texts, plain, max_size=2)
