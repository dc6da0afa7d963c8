"""Scale the channels of activations before anything else is measured."""

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.candidates.channel_scales import scale_channels
from rdoq_onnx.config import Config
from rdoq_onnx.curves.measurement import aimed_at
from rdoq_onnx.gradients.batch_sizes import reverse_batch
from rdoq_onnx.gradients.plan import ReversePlan
from rdoq_onnx.observation.observe import observe
from rdoq_onnx.observation.parts import find_parts, measured_tensors
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.threads import Workers


def scaled(network: Network, config: Config, samples: Samples, runtime: Runtime, pool: Workers) -> Network:
    """Scale the channels of the activations of `network` as a reverse pass over `samples` advises."""
    if config.activation_bits is None or not network.activations:
        return network
    parts = find_parts(network.model)
    aimed = aimed_at(network, measured_tensors(parts))
    observation = observe(aimed, parts, samples, runtime)
    batch = reverse_batch(aimed, observation, runtime, len(samples), exact=False)
    plan = ReversePlan(aimed, samples, observation.metric, runtime, pool, batch, config.seed)
    return scale_channels(network, config, plan, samples)
