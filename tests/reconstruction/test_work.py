"""How many steps there are, and of how many samples."""

from dataclasses import replace

from rdoq_onnx.reconstruction.work import BATCH, MOST, default_steps, step_batch


def larger(observation, factor):
    return replace(observation, sizes={name: factor * size for name, size in observation.sizes.items()})


def test_large_tensors_take_fewer_samples_and_then_fewer_steps(digits):
    measurement = digits.allocation.measurement
    network, observation = measurement.network, measurement.observation
    factors = (1, 1000, 10_000, 1_000_000)
    batches = [step_batch(larger(observation, factor)) for factor in factors]
    assert batches[0] == BATCH
    assert batches == sorted(batches, reverse=True)
    assert batches[-1] == 1
    steps = [default_steps(network, larger(observation, factor)) for factor in factors]
    assert steps[0] == MOST
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] == 0
