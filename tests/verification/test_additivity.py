"""Each layer and activation alone: the figure is the distortion of quantizing only that one."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import read_normalized
from rdoq_onnx.config import Config
from rdoq_onnx.curves.checkpoint import Steps, Store
from rdoq_onnx.observation.inputs import samples_for
from rdoq_onnx.probing.probe import Prober
from rdoq_onnx.refinement.judge import Judge
from rdoq_onnx.system.progress import Progress
from rdoq_onnx.verification.additivity import SAMPLES, affordable, measure_alone
from tests.cases import RUNTIME, ignore, measured_whole

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 6] x) => (float[N, 4] y) { [first] z = MatMul (x, w) [act] a = Tanh (z) [second] y = MatMul (a, v) }"""
CONFIG = Config(weight_bits=3, activation_bits=None)


@pytest.fixture(scope="module")
def measured():
    rng = np.random.default_rng(0)
    model = parser.parse_model(TEXT)
    for name, shape in (("w", (6, 5)), ("v", (5, 4))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    normal = read_normalized(model)[1]
    samples = samples_for(normal, {"x": rng.standard_normal((24, 6)).astype(np.float32)}, CONFIG)
    measurement = measured_whole(analyse(normal, CONFIG.selection), CONFIG, samples)
    observation = measurement.observation
    return measurement, Prober(measurement.aimed, samples, observation.metric, RUNTIME, observation.batching)


def test_alone_is_the_emitted_model_with_the_others_wide(measured):
    measurement, prober = measured
    allocation = allocate_bits(measurement, CONFIG.budgets)
    alone = measure_alone(allocation, prober, ignore)
    assert (len(alone.layers), alone.activations, alone.samples) == (2, (), 24)
    judge = Judge.of(measurement, prober.samples, RUNTIME, Steps(Store(), Progress(), "test"))
    for k, value in enumerate(alone.layers):
        bits = tuple(b if j == k else np.full_like(b, 8) for j, b in enumerate(allocation.layer_bits))
        assert judge.distortion(replace(allocation, layer_bits=bits)) == pytest.approx(value, rel=0.1)


def test_large_networks_get_fewer_samples(measured):
    allocation = allocate_bits(measured[0], CONFIG.budgets)
    assert affordable(allocation) == SAMPLES[1]
    seen = measured[0].observation
    large = replace(measured[0], observation=replace(seen, sizes=dict.fromkeys(seen.sizes, 10**10)))
    assert affordable(replace(allocation, measurement=large)) == SAMPLES[0]
