"""Samples of a run: from the user's calibration data, or random ones of the model's input shapes."""

from typing import Any

import onnx

from rdoq_onnx.analysis.analyse import analyse, integer_ranges
from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.load import load_samples, synthetic
from rdoq_onnx.calibration.samples import Samples, input_specs
from rdoq_onnx.config import Config
from rdoq_onnx.model.validate import check_sizes
from rdoq_onnx.observation.batching import separated
from rdoq_onnx.observation.padding import unpadded
from rdoq_onnx.system.progress import Progress
from rdoq_onnx.system.runtime import Runtime

SYNTHETIC_SAMPLES = 64


def network_and_samples(
    model: onnx.ModelProto, calibration: Any, config: Config, runtime: Runtime, progress: Progress
) -> tuple[Network, Samples]:
    """Analyse a normalized model and load the samples of a run.

    Raises ModelError, ConfigError or CalibrationError.
    """
    network = analyse(model, config.selection)
    check_sizes(model)
    return network, batched(network, model, samples_for(model, calibration, config, progress), runtime)


def batched(network: Network, model: onnx.ModelProto, samples: Samples, runtime: Runtime) -> Samples:
    """Return `samples` without padding, and with all rows of a run as one sample if the network mixes them."""
    return separated(network, unpadded(model, samples, runtime), runtime)


def validation_samples(
    network: Network, model: onnx.ModelProto, source: Any, config: Config, runtime: Runtime
) -> Samples:
    """Load the samples of --validation, all of them. Raises CalibrationError if they do not fit the model."""
    return batched(network, model, load_samples(source, input_specs(model), None, config.pixels), runtime)


def samples_for(model: onnx.ModelProto, calibration: Any, config: Config, progress: Progress | None = None) -> Samples:
    """Load the samples of a run. Raises CalibrationError if they do not fit the model."""
    specs = input_specs(model)
    if calibration is None:
        return synthetic(specs, config.samples or SYNTHETIC_SAMPLES, config.seed, integer_ranges(model))
    return load_samples(calibration, specs, config.samples, config.pixels, (progress or Progress()).note)
