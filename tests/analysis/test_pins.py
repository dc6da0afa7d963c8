"""Pins that a network does not have, that exceed a layer, or that contradict each other are refused before the work."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import read_normalized
from rdoq_onnx.config import Config
from rdoq_onnx.errors import ConfigError


@pytest.fixture(scope="module")
def model():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 6] y)
        { [stem] a = MatMul (x, w) b = Relu (a) [head] y = MatMul (b, v) }""")
    rng = np.random.default_rng(0)
    for name, shape in (("w", (4, 5)), ("v", (5, 6))):
        values = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return read_normalized(model)[1]


@pytest.mark.parametrize(
    ("pins", "said"),
    [
        (
            (("stem", 4), ("stem", 5)),
            "--pin stem=4 and --pin stem=5 both fix channels 0 to 4 of 'stem'; give one",
        ),
        ((("stem", 4), ("w", 2)), "--pin stem=4 and --pin w=2 both fix"),
        ((("st.*", 4), ("head", 3), ("h.*", 4)), "--pin head=3 and --pin h.*=4 both fix channels 0 to 5 of 'head'"),
        ((("head[0:3]", 4), ("head[2:]", 2)), "both fix channels 2 to 2 of 'head'"),
        ((("x", 4), ("x", 8)), "--pin x=4 and --pin x=8 both fix 'x'; give one width"),
        ((("head[0:7]", 4),), "--pin head[0:7]=4: 'head' has no such channels; give a range within [0:6]"),
        ((("head[6:]", 4),), "give a range within [0:6]"),
        ((("head[3:2]", 4),), "give a range within [0:6]"),
        ((("tem", 4),), "--pin tem=4 matches no layer or activation; a pattern matches whole names: give '.*tem.*'"),
        ((("x[0:1]", 4),), "--pin x[0:1]=4 matches no layer or activation"),
        (((r"\[0:4]", 4),), "matches no layer or activation"),
    ],
)
def test_refused(model, pins, said):
    with pytest.raises(ConfigError) as caught:
        analyse(model, Config(pins=pins).selection)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "pins",
    [
        (("head[0:3]", 4), ("head[3:]", 2), ("stem", 4)),
        (("stem", 4), ("s.*", 4)),
        (("stem", 4), ("x", 8)),
        (("head[:6]", 4),),
    ],
)
def test_accepted(model, pins):
    assert len(analyse(model, Config(pins=pins).selection).layers) == 2
