"""Hypothesis strategies, one for each kind of input; a new feature is added here."""

import numpy as np
from hypothesis import strategies as st
from onnx import numpy_helper, parser

from rdoq_onnx.curves.curves import Curves


@st.composite
def curves(draw, min_units=1, max_units=5, max_widths=5, max_elements=12, ties=True):
    """Curves like measured ones: falling, noisy, not convex, some points disallowed, some units dead.

    ties: also small integers as distortions, so that slopes coincide, and distortions of zero.
    """
    widths = np.array(sorted(draw(st.sets(st.integers(0, 16), min_size=1, max_size=max_widths))))
    units = draw(st.integers(min_units, max_units))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    elements = rng.integers(1, draw(st.integers(1, max_elements)), units, endpoint=True)
    shape = (units, widths.size)
    kinds = ["falling", "noise", *(["integers"] if ties else [])]
    kind = draw(st.sampled_from(kinds))
    if kind == "falling":
        level = 10.0 ** rng.uniform(-3, 3, (units, 1))
        distortion = level * rng.uniform(1.2, 5, (units, 1)) ** -widths * rng.lognormal(0, 0.4, shape)
    elif kind == "noise":
        distortion = rng.random(shape)
    else:
        distortion = rng.integers(0, draw(st.integers(0, 6)), shape, endpoint=True).astype(float)
    if draw(st.booleans()):
        distortion[rng.random(shape) < 0.3] = np.inf
        kept = rng.integers(widths.size, size=units)
        distortion[np.arange(units), kept] = rng.random(units)
    if ties and draw(st.booleans()):
        distortion[rng.integers(units)] = 0.0
    return Curves(widths, elements, distortion)


def rate_range(curves):
    """The least budget that can be met, and the least that buys every unit its widest width."""
    finite = np.isfinite(curves.distortion)
    least = np.where(finite, curves.rate, np.iinfo(np.int64).max).min(axis=1)
    most = np.where(finite, curves.rate, 0).max(axis=1)
    return int(least.sum()), int(most.sum())


@st.composite
def curves_and_budget(draw, **kwargs):
    """Curves and a budget that can be met, now and then an ample one."""
    drawn = draw(curves(**kwargs))
    least, most = rate_range(drawn)
    return drawn, draw(st.integers(least, most + 3))


@st.composite
def networks(draw, max_nodes=6):
    """A small network with samples: layers of every kind, activation functions, pools, branches that join again.

    Returns (model, samples by input name).
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    builder = _Builder(rng)
    shape = (draw(st.integers(3, 5)), 7, 6) if draw(st.booleans()) else (draw(st.integers(6, 12)),)
    builder.shapes["x"] = shape
    tensor = builder.layer(draw, "x")
    for _ in range(draw(st.integers(1, max_nodes))):
        kind = draw(st.sampled_from(["layer", "function", "join", "move"]))
        tensor = getattr(builder, kind)(draw, tensor)
    return builder.model(tensor), {"x": rng.uniform(-1, 1, (96, *shape)).astype(np.float32)}


class _Builder:
    """Nodes of a network as text, with the shapes of its tensors but for the samples' axis."""

    def __init__(self, rng):
        self.rng, self.nodes, self.weights, self.shapes = rng, [], {}, {}

    def layer(self, draw, x):
        shape, outputs = self.shapes[x], draw(st.integers(4, 8))
        inputs = shape[0]
        if len(shape) == 1 and draw(st.booleans()):
            transposed = draw(st.booleans())
            w = self._weight(*((outputs, inputs) if transposed else (inputs, outputs)))
            return self._node(f"Gemm <transB = {int(transposed)}> ({x}, {w}, {self._weight(outputs)})", (outputs,))
        kind = draw(st.sampled_from(["Conv", "depthwise", "ConvTranspose", "MatMul"])) if len(shape) > 1 else "MatMul"
        if kind == "MatMul":
            return self._node(f"MatMul ({x}, {self._weight(shape[-1], outputs)})", (*shape[:-1], outputs))
        if kind == "depthwise":
            w = self._weight(inputs, 1, 3, 3)
            return self._node(f"Conv <group = {inputs}, pads = [1, 1, 1, 1]> ({x}, {w})", shape)
        if kind == "Conv":
            w, b = self._weight(outputs, inputs, 3, 3), self._weight(outputs)
            return self._node(f"Conv <pads = [1, 1, 1, 1]> ({x}, {w}, {b})", (outputs, *shape[1:]))
        w = self._weight(inputs, outputs, 3, 3)
        return self._node(f"ConvTranspose <pads = [1, 1, 1, 1]> ({x}, {w})", (outputs, *shape[1:]))

    def function(self, draw, x):
        kind = draw(st.sampled_from(["Relu", "Sigmoid", "Tanh", "LeakyRelu", "Softplus"]))
        return self._node(f"{kind} ({x})", self.shapes[x])

    def join(self, draw, x):
        other = draw(st.sampled_from([t for t, s in self.shapes.items() if s == self.shapes[x]]))
        kind = draw(st.sampled_from(["Add", "Mul", "Concat"]))
        first, *rest = self.shapes[x]
        shape = (2 * first, *rest) if kind == "Concat" else (first, *rest)
        return self._node(f"{kind}{' <axis = 1>' if kind == 'Concat' else ''} ({x}, {other})", shape)

    def move(self, draw, x):
        shape = self.shapes[x]
        if len(shape) == 1:
            return self._node(f"Identity ({x})", shape)
        kind = draw(st.sampled_from(["MaxPool", "AveragePool", "Transpose", "Flatten"]))
        if kind == "Flatten":
            return self._node(f"Flatten ({x})", (int(np.prod(shape)),))
        if kind == "Transpose":
            return self._node(f"Transpose <perm = [0, 1, 3, 2]> ({x})", (shape[0], shape[2], shape[1]))
        return self._node(f"{kind} <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> ({x})", shape)

    def model(self, y):
        dims = ", ".join(map(str, self.shapes["x"]))
        ends = ", ".join(map(str, self.shapes[y]))
        body = " ".join(f"{name} = {text}" for name, text in self.nodes)
        signature = f"(float[N, {dims}] x) => (float[N, {ends}] {y})"
        model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {signature} {{ {body} }}')
        model.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in self.weights.items())
        return model

    def _node(self, text, shape):
        name = f"t{len(self.nodes)}"
        self.nodes.append((name, text))
        self.shapes[name] = tuple(shape)
        return name

    def _weight(self, *shape):
        name = f"w{len(self.weights)}"
        fan = max(int(np.prod(shape[1:])), 1)
        self.weights[name] = (self.rng.standard_normal(shape) / fan**0.5).astype(np.float32)
        return name
