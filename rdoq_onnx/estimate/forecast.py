"""Foresee the work of a run on a model with detached weights, without a run and without reading a weight."""

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.config import Config
from rdoq_onnx.curves.float_fallback import in_float, not_quantized
from rdoq_onnx.curves.measurement import aimed_at
from rdoq_onnx.estimate.sizes import inferred, inner
from rdoq_onnx.estimate.space import shortages, space
from rdoq_onnx.estimate.work import Work
from rdoq_onnx.observation.observe import Observation
from rdoq_onnx.observation.padding import presumably_unpadded
from rdoq_onnx.observation.parts import find_parts, measured_tensors
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.scratch import Scratch


def foreseen(network: Network, samples: Samples, config: Config, runtime: Runtime) -> tuple[Work, Samples]:
    """Count the work of quantizing `network` with `samples`; also return these without what seems to be padding."""
    cut = presumably_unpadded(network.model, samples)
    parts = find_parts(network.model)
    aimed = aimed_at(network, measured_tensors(parts))
    observation = inferred(aimed, parts, cut, runtime)
    return counted(aimed, cut, config, runtime, observation), cut


def counted(aimed: Network, samples: Samples, config: Config, runtime: Runtime, observation: Observation) -> Work:
    """Count the work of quantizing `aimed`, whose outputs are the measured tensors, with `samples`."""
    network = in_float(aimed, not_quantized(aimed, config, observation.sizes))
    return Work(network, config, runtime, observation, len(samples), inner(aimed, samples, observation, runtime))


def warned(network: Network, samples: Samples, config: Config, runtime: Runtime, scratch: Scratch) -> tuple[str, ...]:
    """Word what a run of `network`, whose weights are detached, probably lacks; nothing if that cannot be foreseen."""
    try:
        work, _ = foreseen(network, samples, config, runtime)
        return shortages(space(work, scratch.shelf.size), config, scratch)
    except Exception:  # an estimate is no reason to fail
        return ()
