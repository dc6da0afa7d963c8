"""The Python API: `quantize`, and its steps one by one."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from rdoq_onnx import pipeline
from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.analysis.normalization import Model, read_normalized, runnable
from rdoq_onnx.analysis.pins import check_pins
from rdoq_onnx.calibration.loaders import Transformed
from rdoq_onnx.calibration.split import SampleSplit
from rdoq_onnx.cluster.ray_cluster import computing
from rdoq_onnx.config import Budgets, Config
from rdoq_onnx.cost.given import read_cost
from rdoq_onnx.curves.checkpoint import Steps
from rdoq_onnx.curves.measure import measure as measure_curves
from rdoq_onnx.curves.measure import regime
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.curves.stores import scratch_for, store_for
from rdoq_onnx.emission.emit import emit_model
from rdoq_onnx.errors import ConfigError, ModelError
from rdoq_onnx.keywords import Options, Pins, flag, keywords, number
from rdoq_onnx.model.cost_rows import parse_amount
from rdoq_onnx.model.equality import same
from rdoq_onnx.model.external import attached
from rdoq_onnx.observation.inputs import network_and_samples
from rdoq_onnx.refinement.reference import Reference
from rdoq_onnx.report.result import Result
from rdoq_onnx.system import io
from rdoq_onnx.system.progress import OnProgress, Progress, Told
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.targets import Storage
from rdoq_onnx.verification.compare import Comparison, compared, unmeasured

if TYPE_CHECKING:
    from typing_extensions import Unpack

Bits = float | str  # text as on the command line
Transform = Callable[[Any], Any]


def quantize(
    model: Model,
    calibration: Any = None,
    *,
    bits: Bits = 8,
    weight_bits: Bits | None = None,
    activation_bits: Bits | None = None,
    weights_only: bool = False,
    curves: str | Path | None = None,
    validation: Any = None,
    transform: Transform | None = None,
    progress: OnProgress | None = None,
    **options: "Unpack[Options]",
) -> Result:
    """Quantize `model` and verify the result (Wang et al., RDO-Q, ECCV 2022; docs/method.md).

    model: a path or a ModelProto, which is not modified. calibration: the path of an .npz, .npy or folder
    (docs/calibration.md), "module:function", a dict of arrays with the samples on axis 0, an iterable of feeds such as
    a DataLoader, or an object with ONNX Runtime's `get_next()`; None for synthetic samples. A feed is a dict of arrays,
    a tuple or list of arrays in the order of the inputs, then the labels if there are, or one array. transform: a
    function that makes a feed of each item of such an iterable.
    bits: average bits per weight and per activation element, 0 to 8; `weight_bits` and `activation_bits` override it
    for one side, `weights_only` leaves activations in float. curves: checkpoint of the measurement, which is resumed
    from this file if it exists. validation: samples that goals, gates and figures are of, in place of some of the
    calibration's. progress: called with the name of a step, the parts done of it, and their number; the logger
    "rdoq_onnx" reports the same steps. options: the other fields of `config.Config`, named as the command line's
    options: `samples`, `effort`, `target`, `pins`, `size`, `sqnr` and so on. Text that the command line takes is
    accepted, such as activation_bits="none" or size="30kB"; pins may be a dict.

    Returns the emitted model with its report and allocation; writes nothing but `curves`. Raises RdoqError; errors.py
    lists its subclasses.

    >>> result = quantize("models/digits_cnn.onnx", "models/digits_calib.npz", bits=4, samples=24, effort="fast")
    >>> result.report.weight_bits <= 4 and result.report.sqnr_db > 10
    True
    >>> result.report.layers[0].name, len(result.report.layers[0].bits)
    ('/0/Conv', 16)
    """
    _check_one_budget(options.get("budget"), bits, weight_bits, activation_bits)
    sides = _sides(bits, weight_bits, activation_bits, weights_only)
    config = Config(**sides, **keywords(_with_cost(options), _ALSO))
    samples, others = _transformed(calibration, transform), _transformed(validation, transform)
    result = pipeline.run(model, samples, config, Told(progress), curves, others)
    return replace(result, model=attached(result.model))


def measure(
    model: Model,
    calibration: Any = None,
    *,
    weights_only: bool = False,
    curves: str | Path | None = None,
    transform: Transform | None = None,
    progress: OnProgress | None = None,
    **options: "Unpack[Options]",
) -> Measurement:
    """Measure the rate-distortion curve of every channel and activation of `model` (Eq. 3 to 8), the slow step.

    Arguments as for `quantize`. All samples are used; none is held out. The curves of the result are float64
    [units, 9], δ at 0 to 8 bits, one row per channel of each layer and then one per activation; inf where a width is
    not offered. Raises RdoqError.

    >>> measurement = measure("models/digits_cnn.onnx", "models/digits_calib.npz", samples=24, effort="fast")
    >>> measurement.curves.distortion.shape == (measurement.channels + len(measurement.network.activations), 9)
    True
    >>> allocation = allocate(measurement, weight_bits=3, activation_bits=6)
    >>> allocation.weight_average <= 3, allocation.predicted > allocate(measurement, bits=6).predicted
    (True, True)
    >>> all(v.version >= 13 for v in emit("models/digits_cnn.onnx", allocation).opset_import if not v.domain)
    True
    """
    config = Config(
        **_sides(8, None, None, weights_only), **keywords(options, ("weights_only", "curves", "transform", "progress"))
    )
    scratch = scratch_for(config, curves)
    normal = read_normalized(model, scratch.shelf, config.selection.activations)[1]
    runtime, told = Runtime(config.provider, config.threads), Told(progress)
    network, samples = network_and_samples(normal, _transformed(calibration, transform), config, runtime, told)
    steps = Steps(store_for(normal, samples, len(samples), config, curves, scratch), told, regime(config, normal))
    with computing(config.workers, config.threads) as steps.store.compute:
        return measure_curves(network, config, SampleSplit.whole(samples, config.seed), runtime, steps)


def allocate(
    measurement: Measurement,
    *,
    bits: Bits = 8,
    weight_bits: Bits | None = None,
    activation_bits: Bits | None = None,
    joint: bool = False,
    pins: Pins = (),
    size: int | str | None = None,
    layer_limit: int | str | None = None,
    storage: Storage | None = None,
    cost: Any = None,
    budget: float | str | None = None,
) -> Allocation:
    """Choose the widths of least predicted distortion within the budgets (Lagrangian; allocate.py proves the gap).

    Arguments as for `quantize`. pins: a dict, or pairs, of a name or regular expression of layers or activations
    and their width. size: maximum bytes of all weights at their widths, instead of `weight_bits`; layer_limit: of any
    layer's weights. storage: "nbits" sets a price on several widths in a layer. Raises BudgetError if a budget cannot
    be met, ConfigError if a pin matches nothing. cost, budget: as for `quantize`; not "measured", which needs a run.
    """
    _check_one_budget(budget, bits, weight_bits, activation_bits)
    quantized = bool(measurement.network.activations)
    if quantized and activation_bits == "none":
        raise ConfigError("--activation-bits none: the curves quantize activations; measure with weights_only=True")
    sides = _sides(bits, weight_bits, activation_bits, weights_only=not quantized)
    plain = {"joint": joint, "pins": pins, "size": size, "layer_limit": layer_limit, "storage": storage}
    rest = keywords(_with_cost(plain | {"cost": cost, "budget": budget}))
    budgets = Budgets(**sides, **rest)
    check_pins(measurement.network, budgets.pins)
    return allocate_bits(measurement, budgets)


def emit(
    model: Model, allocation: Allocation, *, storage: Storage | None = None, keep_channels: bool = False
) -> onnx.ModelProto:
    """Quantize `model`, which must be the measured one, to the widths of `allocation`.

    storage: "packed", "native", "int8" or "nbits"; None for the default of the measurement's target. keep_channels:
    keep 0-bit channels. Raises ModelError if `model` is not the measured one.
    """
    forms = (read_normalized(model, products=products)[1] for products in (True, False))
    if not any(same(form, allocation.measurement.source) for form in forms):
        raise ModelError("this is not the model that the allocation was measured on; measure it first")
    network = allocation.measurement.network
    given = keywords({"target": network.target.name, "storage": storage})
    given["activation_bits"] = 8 if network.activations else None
    kept = flag("keep_channels", keep_channels)
    return attached(emit_model(allocation, {}, Config(**given).storage, kept).model)


_ALSO = (
    "bits",
    "weights_only",
    "curves",
    "validation",
    "transform",
    "progress",
)  # keywords that are no fields of Config


def compare(
    original: Model,
    quantized: Model,
    data: Any,
    *,
    transform: Transform | None = None,
    **options: "Unpack[Options]",
) -> Comparison:
    """Compare a quantized model, made by any tool, with the float model `original` on `data`, as verification does.

    data: as `calibration` of `quantize`; integers under "y", or the last array of each feed, are labels. options:
    `samples`, `image_mean`, `image_std`, `image_scale`, `provider` and `threads` of `quantize`.

    Raises RdoqError, ModelError if the two models do not belong together.

    >>> result = quantize("models/digits_cnn.onnx", "models/digits_calib.npz", bits=4, samples=24, effort="fast")
    >>> found = compare("models/digits_cnn.onnx", result.model, "models/digits_test.npz", samples=100)
    >>> found.samples, found.sqnr_db > 10, found.agreement.share > 0.9
    (100, True, True)
    """
    config = Config(**keywords(options))
    runtime, scratch = Runtime(config.provider, config.threads), scratch_for(config, None)
    float_model, normal = read_normalized(original, scratch.shelf)
    candidate = quantized if isinstance(quantized, onnx.ModelProto) else io.read_model(quantized)
    network, samples = network_and_samples(normal, _transformed(data, transform), config, runtime, Progress())
    measurement = unmeasured(network, samples, runtime)
    return compared(candidate, Reference(runnable(float_model), measurement, samples, runtime))


def _transformed(source: Any, transform: Transform | None) -> Any:
    return source if transform is None or source is None else Transformed(source, transform)


def _check_one_budget(budget: object, *bits: object) -> None:
    """Raise ConfigError for bits beside the budget of a cost; activation_bits="none" is no budget."""
    if budget is not None and any(value not in (None, 8, "8", "none") for value in bits):
        raise ConfigError("budget takes the place of bits, weight_bits and activation_bits; give one")


def _with_cost(options: Mapping[str, Any]) -> dict[str, Any]:
    """Read the file of a cost, and the budget in its unit."""
    cost, budget = options.get("cost"), options.get("budget")
    if not isinstance(cost, str | Path):
        return dict(options)
    read = read_cost(str(cost))
    given: dict[str, Any] = {"cost": read}
    if isinstance(budget, str):
        given["budget"] = parse_amount("--budget", budget, read.unit)
    return {**options, **given}


def _sides(bits: Bits, weight_bits: Bits | None, activation_bits: Bits | None, weights_only: bool) -> dict[str, Any]:
    """Return the budget of each side under its name in Config and Budgets."""
    both = number("--bits", bits)
    weights = both if weight_bits is None else number("--weight-bits", weight_bits)
    if flag("weights_only", weights_only) or activation_bits == "none":
        return {"weight_bits": weights, "activation_bits": None}
    activations = both if activation_bits is None else number("--activation-bits", activation_bits)
    return {"weight_bits": weights, "activation_bits": activations}
