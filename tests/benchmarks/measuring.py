"""Measure with no samples held out."""

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.calibration.split import SampleSplit
from rdoq_onnx.config import Config
from rdoq_onnx.curves.checkpoint import Steps, Store
from rdoq_onnx.curves.measure import measure_network
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.system.progress import Progress
from rdoq_onnx.system.runtime import Runtime


def measured_whole(
    network: Network, config: Config, samples: Samples, runtime: Runtime, progress: Progress | None = None
) -> Measurement:
    """Measure the curves of `network` on all `samples`."""
    steps = Steps(Store(), progress or Progress(), "benchmark")
    return measure_network(network, config, SampleSplit.whole(samples, config.seed), runtime, steps)
