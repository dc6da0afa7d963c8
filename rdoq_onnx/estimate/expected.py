"""Foresee the steps of a run that has begun, for what its progress shows."""

from collections.abc import Mapping
from dataclasses import replace

import onnx

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.network import Network
from rdoq_onnx.analysis.skips import presumed_finite
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.config import Config
from rdoq_onnx.curves.divergence import chosen_metric
from rdoq_onnx.curves.measurement import aimed_at
from rdoq_onnx.estimate.forecast import counted, foreseen
from rdoq_onnx.estimate.seconds import Estimate
from rdoq_onnx.estimate.speeds import counted_passes, speeds, timed_passes
from rdoq_onnx.estimate.work import Work
from rdoq_onnx.model.external import is_detached
from rdoq_onnx.observation.observe import observe
from rdoq_onnx.observation.parts import find_parts, measured_tensors
from rdoq_onnx.system.runtime import Runtime

OBSERVED = 8  # samples that sizes are taken from


def expected_seconds(
    normal: onnx.ModelProto, samples: Samples, config: Config, runtime: Runtime
) -> Mapping[str, float]:
    """Estimate the seconds of each step of quantizing the normalized model; nothing if that cannot be foreseen."""
    try:
        network = analyse(normal, config.selection, presumed_finite)
        return estimated(network, samples, config, runtime)[0].steps()
    except Exception:  # an estimate is no reason to fail
        return {}


def estimated(
    network: Network, samples: Samples, config: Config, runtime: Runtime, reading: float = 0.0
) -> tuple[Estimate, Samples]:
    """Estimate a run on `samples`; also return them as the run has them. Raises what a run would.

    reading: seconds that reading and normalizing took. Of detached weights sizes and multiplications are counted;
    otherwise some samples run, and passes are timed.
    """
    if is_detached(network.model):
        work, samples = foreseen(network, samples, config, runtime)
        passes = counted_passes(work, runtime)
    else:
        work = _observed(network, samples, config, runtime)
        passes = timed_passes(work.network.model, samples, work.observation.batching.size, runtime)
    return Estimate(work, speeds(work, *passes), reading), samples


def _observed(network: Network, samples: Samples, config: Config, runtime: Runtime) -> Work:
    """Count the work of a run from a pass over some samples."""
    parts = find_parts(network.model)
    aimed = aimed_at(network, measured_tensors(parts))
    observation = observe(aimed, parts, samples.some(OBSERVED), runtime)
    observation = replace(observation, metric=chosen_metric(observation.metric, config))
    return counted(aimed, samples, config, runtime, observation)
