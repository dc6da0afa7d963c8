"""Say how fast the emitted model is, and why where it is no faster than the float model."""

from collections import Counter
from collections.abc import Sequence

from rdoq_onnx.analysis.skips import SLOWER
from rdoq_onnx.model.layers import LAYER_TYPES
from rdoq_onnx.report.report import Report
from rdoq_onnx.report.wording import integer_kernels
from rdoq_onnx.verification.latency import Latency

_AS_FAST = "--activation-bits none gives a file of that size at float speed"


def speed_hints(report: Report) -> list[str]:
    """Return one line with the reason and the fix if the file is slower, or if no layer runs on integers."""
    if not any(layer.op in LAYER_TYPES for layer in report.layers):
        return []
    slow = slower(report.latency)
    if report.storage == "nbits":
        found = "weights that stay packed pay where few rows are multiplied, as in decoding"
        return [f"{_times(slow)}: {found}; --storage packed decodes them at load"] if slow else []
    if report.activation_bits is None and any(SLOWER in skip.reason for skip in report.skipped):
        found = "no integer kernel is predicted to be faster; --pin '.*=8' takes them regardless"
        return [f"{_times(slow)}: {found}"] if slow else []
    if report.activation_bits is None:
        how = _times(slow) if slow else "it is smaller, not faster"
        fix = "--activation-bits 8 allows integer kernels"
        return [f"activations are float, so layers run in float on weights decoded at load: {how}; {fix}"]
    if not integer_kernels(report.kernels):
        return [f"no layer runs on an integer kernel ({_reason(report)}): the quantizers only cost time; {_AS_FAST}"]
    if slow is None:
        return []
    if report.float_layers:
        found = f"{len(report.float_layers)} layer nodes run in float ({_reason(report)})"
        return [f"{_times(slow)}: {found}; leave them out with --exclude, or {_AS_FAST}"]
    return [f"{_times(slow)}: on this CPU the quantizers cost more than integer kernels save; {_AS_FAST}"]


def slower(latency: Sequence[Latency]) -> Latency | None:
    """Return the batch at which the file is slower than the float model by most, beyond noise."""
    return max((x for x in latency if x.slower), key=lambda x: x.ratio, default=None)


def _times(latency: Latency) -> str:
    return f"a batch of {latency.batch} takes {latency.ratio:.2f} times as long as in float"


def _reason(report: Report) -> str:
    """Return the most frequent reason for a float kernel."""
    counts = Counter(report.float_layers.values())
    return counts.most_common(1)[0][0] if counts else "ONNX Runtime fuses none of them with their quantizers"
