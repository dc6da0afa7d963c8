"""`--calibration module:function`."""

import sys

import numpy as np
import pytest

from rdoq_onnx.calibration.load import load_samples
from rdoq_onnx.calibration.samples import InputSpec
from rdoq_onnx.errors import CalibrationError

X = InputSpec("x", np.dtype(np.float32), (None, 3))
CODE = """
import numpy as np

def endless():
    k = 0
    while True:
        yield {"x": np.full((2, 3), k, np.float32)}
        k += 1

def arrays():
    return {"x": np.ones((4, 3), np.float32)}

def broken():
    yield {"x": np.ones((1, 3), np.float32)}
    raise ValueError("two\\nlines")

def leaves():
    raise SystemExit(0)

def own_name():
    return "my_feeds:own_name"

class Sized:
    def __len__(self):
        return 5

    def __iter__(self):
        raise OSError

class Reader:
    def get_next(self):
        raise ValueError("torn tape")

def wrong():
    return 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "my_feeds.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("my_feeds", None)


def test_feeds_stop_at_the_limit():
    samples = load_samples("my_feeds:endless", [X], 5)
    assert samples.source == "my_feeds:endless"
    np.testing.assert_array_equal(samples.feeds(slice(None))["x"][:, 0], [0, 0, 1, 1, 2])


def test_a_function_may_return_any_other_source():
    assert len(load_samples("my_feeds:arrays", [X], None)) == 4


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_feeds:broken", "failed with ValueError: two lines"),
        ("my_feeds:leaves", "failed with SystemExit: 0; fix it"),
        ("my_feeds:own_name", "returns 'my_feeds:own_name'; return feeds, arrays or a path"),
        ("my_feeds:Sized", "failed with OSError; fix it"),
        ("my_feeds:Reader", "failed with ValueError: torn tape"),
        ("my_feeds:none", "no attribute 'none'"),
        ("no_such_module:f", "No module named"),
        ("my_feeds:wrong", "a int"),
    ],
)
def test_failures_name_the_function(name, said):
    path = list(sys.path)
    with pytest.raises(CalibrationError) as caught:
        load_samples(name, [X], None)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sys.path == path
