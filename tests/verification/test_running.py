"""Memory and tokens a second of a model while it runs."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.report.wording import latency_rows
from rdoq_onnx.verification import running
from rdoq_onnx.verification.running import Footprint, Running, measure_running, next_feeds
from tests.cases import RUNTIME

DECODER = """<ir_version: 8, opset_import: ["": 17]> g
    (int64[N, T] input_ids, float[N, 1, P, 4] past_key_values.0.key)
    => (float[N, T, 4] logits, float[N, 1, U, 4] present.0.key)
    { e = Gather (table, input_ids) u = Unsqueeze (e, one) present.0.key = Concat <axis = 2> (past_key_values.0.key, u)
      logits = MatMul (e, w) }"""


def decoder():
    model = parser.parse_model(DECODER.replace("past_key_values.0.key", "past_0").replace("present.0.key", "present_0"))
    rng = np.random.default_rng(0)
    values = {"table": rng.standard_normal((9, 4), np.float32), "w": rng.standard_normal((4, 4), np.float32)}
    values |= {"one": np.array([1])}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in values.items())
    return model


def test_the_next_token_reads_what_the_last_call_left():
    ids, mask = np.arange(6).reshape(2, 3), np.ones((2, 3), np.int64)
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": ids * 0 + np.arange(3)}
    feeds |= {"past_key_values.0.key": np.zeros((2, 1, 0, 4)), "seqlens_k": np.array([2, 2])}
    present = np.ones((2, 1, 3, 4))
    found = next_feeds(feeds, {"logits": np.zeros(1), "present.0.key": present})
    assert found is not None
    np.testing.assert_array_equal(found["input_ids"], [[2], [5]])
    np.testing.assert_array_equal(found["position_ids"], [[3], [3]])
    assert found["attention_mask"].shape == (2, 4)
    assert found["past_key_values.0.key"] is present
    assert found["seqlens_k"].tolist() == [3, 3]


@pytest.mark.parametrize("feeds", [{"input_ids": np.ones((1, 2))}, {"x": np.ones(1), "past_0": np.ones(1)}])
def test_other_models_have_no_next_token(feeds):
    assert next_feeds(feeds, {"present_0": np.ones(1)} if "x" in feeds else {"y": np.ones(1)}) is None


def test_a_decoder_has_memory_and_tokens():
    feeds = {"input_ids": np.arange(6).reshape(2, 3), "past_0": np.zeros((2, 1, 0, 4), np.float32)}
    found = measure_running(decoder(), decoder(), Samples("test", feeds), RUNTIME)
    assert found.four_bits is not None
    assert min(each.tokens for each in (found.float, found.emitted, found.four_bits)) > 0


def test_what_is_unknown_is_none(monkeypatch):
    monkeypatch.setattr(running, "four_bits", lambda model: None)
    monkeypatch.setattr(running, "resident_bytes", lambda model: None)
    samples = Samples("test", {"x": np.ones((2, 4), np.float32)})
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }'
    )
    found = measure_running(model, model, samples, RUNTIME)
    assert found == Running(Footprint(None, None), Footprint(None, None), None)
    assert latency_rows((), found) == []


def test_on_a_busy_machine_tokens_are_those_of_processor_time():
    made = Running(Footprint(None, 10.0), Footprint(None, 12.0), None, 0.5)
    (row,) = latency_rows((), made)
    assert row == (
        "tokens a second",
        "12 at batch 1; the float model 10; of processor time, as other work takes 50 % of the processors here",
    )
    (row,) = latency_rows((), replace(made, others=0.05))
    assert row == ("tokens a second", "12 at batch 1; the float model 10")
