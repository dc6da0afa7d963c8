"""The settings of a run, checked once; each field of Config declares its check."""

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, Literal, TypeVar, get_args

from rdoq_onnx.calibration.pixels import Pixels
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.cost_rows import Amount, Cost
from rdoq_onnx.targets import TARGETS, Storage, Target, TargetName

Measure = Literal["taylor", "probe"]
Provider = Literal["auto", "cpu", "cuda"]
Effort = Literal["fast", "default", "best"]
Distortion = Literal["mse", "kl", "auto"]
Side = Literal["weights", "activations", "both"]

MAX_BITS = 8
MAX_THREADS = 1024
BLOCKS = (0, 32, 64, 128)  # weights that share a scale, offered by default beside float activations
NBITS = (0, 2, 4, 8)  # widths with --storage nbits
LEAST_BLOCK, MOST_BLOCK = 16, 4096
MAX_SAMPLES = 1_000_000
MAX_BYTES = 1 << 50
LEAST_MEMORY = 1 << 28
MOST_PERCENT = 10_000  # of what 8 bits everywhere cost

_NARROW = 5  # activation bits up to which the network is prepared for narrow ones
_GOALS = ("size", "sqnr", "top1_agreement")

T = TypeVar("T")
Check = Callable[[str, Any], None]  # takes an option and its value; raises ConfigError


def setting(default: T, check: Check | None = None, *, measured: bool = True, option: str = "") -> T:
    """Declare a field of Config.

    measured: whether curves depend on it other than through the samples and the regime. option: its name on the
    command line, if that is not the field's name.
    """
    return field(default=default, metadata={"check": check, "measured": measured, "option": option})


def optional(take: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """Let `take`, of an option and its value, pass None on."""
    return lambda option, value: None if value is None else take(option, value)


def _within(low: float, high: float, option: str, value: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{option} {value:g} is out of range; give {low:g} to {high:g}")


def _one_of(names: Collection[str], option: str, value: str) -> None:
    if value not in names:
        raise ConfigError(f"{option} {value!r}: choose one of {', '.join(names)}")


def _widths(option: str, widths: tuple[int, ...]) -> None:
    if not widths:
        raise ConfigError(f"{option} is empty; give a range such as 0-8")
    for width in widths:
        _within(0, MAX_BITS, option, width)
    if list(widths) != sorted(set(widths)):
        raise ConfigError(f"{option} {widths}: give each width once, in rising order")


def _blocks(option: str, sizes: tuple[int, ...]) -> None:
    for size in sizes:
        if size:
            _within(LEAST_BLOCK, MOST_BLOCK, option, size)
    if not sizes or list(sizes) != sorted(set(sizes)):
        raise ConfigError(f"{option} {sizes}: give one size or more, each once, in rising order; 0 is a whole channel")


def _pins(option: str, pins: tuple[tuple[str, int], ...]) -> None:
    for pattern, bits in pins:
        _patterns(option, (pattern,))
        _within(0, MAX_BITS, f"{option} {pattern}", bits)


def _patterns(option: str, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"{option} {pattern!r} is not a valid regular expression: {error}") from error


def _samples(option: str, count: int) -> None:
    if count < 2:
        raise ConfigError(f"{option} {count}: at least 2 are needed, one to measure and one to verify")
    if count > MAX_SAMPLES:
        raise ConfigError(f"{option} {count}: give at most {MAX_SAMPLES}")


def _finite(option: str, numbers: Sequence[float], zero: bool = True) -> None:
    if not (numbers and all(math.isfinite(n) and (n or zero) for n in numbers)):
        raise ConfigError(f"{option} {numbers}: give finite numbers{'' if zero else ' other than 0'}, one per channel")


def _factor(option: str, number: float) -> None:
    _finite(option, (number,), zero=False)


def _natural(option: str, value: int) -> None:
    if value < 0:
        raise ConfigError(f"{option} {value}: give 0 or more")


def _threads(option: str, count: int) -> None:
    if not 0 <= count <= MAX_THREADS:
        raise ConfigError(f"{option} {count}: give 0 (automatic) to {MAX_THREADS}")


def _minutes(option: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{option} {value:g}: give a number of minutes above 0")


def _bytes(option: str, count: int) -> None:
    if not 1 <= count <= MAX_BYTES:
        raise ConfigError(f"{option} {count}: give 1 to {MAX_BYTES} bytes")


def _memory(option: str, count: int) -> None:
    _bytes(option, count)
    if count < LEAST_MEMORY:
        raise ConfigError(f"{option} {count}: give at least {LEAST_MEMORY // 2**20}MiB")


def _workers(option: str, workers: str) -> None:
    number = re.fullmatch(r"0*([1-9]\d{0,3})", workers)
    if (number and int(number[1]) <= MAX_THREADS) or workers == "auto" or re.fullmatch(r"ray://[^/\s]+:\d+", workers):
        return
    raise ConfigError(f"{option} {workers!r}: give 1 to {MAX_THREADS} processes, auto, or ray://HOST:PORT")


def _folder(option: str, path: str) -> None:
    if not path:
        raise ConfigError(f"{option} '': give the path of a folder")


def _percentage(option: str, value: float) -> None:
    _within(0, 100, option, value)
    if 0 < value <= 1:
        raise ConfigError(f"{option} {value:g} is a percentage: did you mean {100 * value:g}?")


def _amount(option: str, amount: Amount) -> None:
    if not (math.isfinite(amount.value) and amount.value > 0):
        raise ConfigError(f"{option} {amount.value:g}: give a number above 0")
    if amount.percent and amount.value > MOST_PERCENT:
        raise ConfigError(f"{option} {amount.value:g}% is out of range; give at most {MOST_PERCENT}%")


def _decibels(option: str, value: float) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"{option} {value}: give a finite number of decibels")


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """The constraints of the allocation; fields and checks as in Config."""

    weight_bits: float = 8.0
    activation_bits: float | None = 8.0
    joint: bool = False
    size: int | None = None
    layer_limit: int | None = None
    layer_limit_activations: bool = False
    pins: tuple[tuple[str, int], ...] = ()
    storage: Storage | None = None
    cost: Cost | None = None
    budget: Amount | None = None

    def __post_init__(self) -> None:
        _check_fields(self)
        _check_joint(self)
        _check_cost(self)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What to quantize; fields as in Config.

    activations: whether to quantize activations. blocks: numbers of weights that may share a scale, see
        `Config.block_size`. narrow: whether activations get so few bits that an Add should read 8 where a layer reads
        fewer.
    """

    target: Target = TARGETS["onnxruntime"]
    exclude: tuple[str, ...] = ()
    exclude_ops: tuple[str, ...] = ()
    pins: tuple[tuple[str, int], ...] = ()
    activations: bool = True
    blocks: tuple[int, ...] = (0,)
    narrow: bool = False


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run, named as the command line's options. Raises ConfigError on a value out of range.

    weight_bits, activation_bits: budgets, average bits per element; `activation_bits` None leaves activations in float.
    sqnr, top1_agreement: a goal instead of a budget: the output SQNR in dB, or the percentage of samples that keep
        their top class, to reach with the fewest bits, or at the least `cost`, of which `budget` is then the most.
        moved: the budgets of bits to lower for it.
    joint: spend one budget on weights and activations together; both budgets must then be equal.
    widths: bit widths that a weight channel may take. Activations may take 1 to 8.
    block_size: numbers of consecutive weights of a channel that may share a scale, beside float activations; 0 for
        all of them. None for BLOCKS, or for 0 alone where nothing else is possible.
    pins: (pattern, bits), the width of matching layers or activations; "NAME[0:16]" means channels 0 to 15 of a layer.
    exclude, exclude_ops: patterns and types of layers that stay in float.
    size: maximum bytes of all weights at their widths, instead of `weight_bits`. layer_limit: of any layer's weights.
    layer_limit_activations: whether `layer_limit` also counts a layer's input and output, of one sample.
    cost: what each layer costs by its widths, reported; None for nothing. budget: what all of them may cost, instead of
        `weight_bits`, `activation_bits` and `size`, which then only say what channel scales are chosen for.
    samples: number of calibration samples to use, evenly spaced; None for all (64 if they are synthetic).
    image_scale, image_mean, image_std: images become (x · scale - mean) / std; None for the defaults of `Pixels`.
    measure: how to measure curves, "taylor" (first order) or "probe" (exact, slow).
    distortion: "mse" minimizes the squared error of the outputs, "kl" the divergence of rows of logits, "auto" that of
        a language model at up to 3.5 bits of weights, else the squared error, with bits moved towards the divergence
        where that costs little.
    effort: "fast" takes the first allocation, or uniform widths if they measure better; "default" anchors curves to
        exact runs and swaps bits; "best" also adds copies of few images, re-rounds and re-measures around the
        allocation, swaps longer, and tunes all that is quantized by gradients.
    minutes: what a run of effort "best" should take; its tuning gets what the other steps leave. None for a number of
        steps that follows from the network's size.
    seed: seed of everything random, 0 or more.
    target: the runtime that the file is for; targets.py has its rules.
    storage: how to store weights, "packed" (exactly their bits), "native" (INT2, INT4, INT8), "int8" or "nbits" (in
        ONNX Runtime's MatMulNBits, with widths of NBITS alone); None for the target's default.
    keep_channels: keep channels of 0 bits in the file instead of folding them away.
    threads: threads of ONNX Runtime, 0 to 1024; 0 lets it choose.
    min_sqnr, max_bytes: minimum output SQNR in dB, and maximum file size, of the emitted model.
    scratch: folder for what large networks keep on the disk during a run; None for the system's temporary folder.
    memory: bytes that a run should not exceed; None for a third of the machine's.
    workers: what computes sums over samples: a number of processes on this machine, "auto" or "ray://HOST:PORT" for
        those of a Ray cluster; None for the process of the run.
    """

    weight_bits: float = setting(8.0, partial(_within, 0, MAX_BITS), measured=False)
    activation_bits: float | None = setting(8.0, optional(partial(_within, 1, MAX_BITS)), measured=False)
    sqnr: float | None = setting(None, optional(_decibels), measured=False)
    top1_agreement: float | None = setting(None, optional(_percentage), measured=False)
    moved: Side = setting("both", partial(_one_of, get_args(Side)), measured=False)
    joint: bool = setting(False, measured=False)
    widths: tuple[int, ...] = setting(tuple(range(MAX_BITS + 1)), _widths)
    block_size: tuple[int, ...] | None = setting(None, optional(_blocks))
    pins: tuple[tuple[str, int], ...] = setting((), _pins, measured=False, option="--pin")
    exclude: tuple[str, ...] = setting((), _patterns)
    exclude_ops: tuple[str, ...] = setting(())
    size: int | None = setting(None, optional(_bytes), measured=False)
    layer_limit: int | None = setting(None, optional(_bytes), measured=False)
    layer_limit_activations: bool = setting(False, measured=False)
    cost: Cost | None = setting(None, measured=False)
    budget: Amount | None = setting(None, optional(_amount), measured=False)
    samples: int | None = setting(None, optional(_samples), measured=False)
    image_scale: float | None = setting(None, optional(_factor), measured=False)
    image_mean: tuple[float, ...] | None = setting(None, optional(_finite), measured=False)
    image_std: tuple[float, ...] | None = setting(None, optional(partial(_finite, zero=False)), measured=False)
    measure: Measure = setting("taylor", partial(_one_of, get_args(Measure)))
    distortion: Distortion = setting("auto", partial(_one_of, get_args(Distortion)))
    effort: Effort = setting("default", partial(_one_of, get_args(Effort)))
    minutes: float | None = setting(None, optional(_minutes), measured=False)
    seed: int = setting(0, _natural)
    provider: Provider = setting("auto", partial(_one_of, get_args(Provider)), measured=False)
    target: TargetName = setting("onnxruntime", partial(_one_of, TARGETS))
    storage: Storage | None = setting(None, measured=False)
    keep_channels: bool = setting(False, measured=False)
    threads: int = setting(0, _threads, measured=False)
    min_sqnr: float | None = setting(None, optional(_decibels), measured=False)
    max_bytes: int | None = setting(None, optional(_bytes), measured=False)
    scratch: str | None = setting(None, optional(_folder), measured=False)
    memory: int | None = setting(None, optional(_memory), measured=False)
    workers: str | None = setting(None, optional(_workers), measured=False)

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.storage == "nbits" and self.widths == tuple(range(MAX_BITS + 1)):
            object.__setattr__(self, "widths", NBITS)  # those of all widths that there are
        for check in (_check_joint, _check_cost, _check_storage, _check_goals, _check_blocks, _check_minutes):
            check(self)

    def measuring(self) -> dict[str, Any]:
        """Return the settings that curves depend on, except the regime of `activation_bits` (`measure.regime`)."""
        values = asdict(self)
        return {f.name: values[f.name] for f in fields(self) if f.metadata["measured"]}

    @property
    def budgets(self) -> Budgets:
        return Budgets(**{f.name: getattr(self, f.name) for f in fields(Budgets)})

    @property
    def selection(self) -> Selection:
        return Selection(
            target=TARGETS[self.target],
            exclude=self.exclude,
            exclude_ops=self.exclude_ops,
            pins=self.pins,
            activations=self.activation_bits is not None,
            blocks=(0,) if _one_scale(self) else self.block_size or BLOCKS,
            narrow=self.narrow,
        )

    @property
    def narrow(self) -> bool:
        """Whether activations get so few bits that the network is prepared for it, even at the weights' expense."""
        return self.activation_bits is not None and self.activation_bits <= _NARROW

    @property
    def seeks(self) -> bool:
        """Whether a goal sets the budget."""
        return self.sqnr is not None or self.top1_agreement is not None

    @property
    def spends_cost(self) -> bool:
        """Whether what is spent is `cost`, not bits."""
        return self.cost is not None and (self.budget is not None or self.seeks)

    @property
    def pixels(self) -> Pixels:
        return Pixels(self.image_scale, self.image_mean, self.image_std)


def _check_fields(settings: Config | Budgets) -> None:
    """Run the check declared in Config for each field of `settings`."""
    for name in (f.name for f in fields(settings)):
        check = Config.__dataclass_fields__[name].metadata["check"]
        if check is not None:
            check(option_of(name), getattr(settings, name))


def option_of(name: str) -> str:
    """Return the option of the command line that sets the field `name` of Config."""
    option: str = Config.__dataclass_fields__[name].metadata["option"]
    return option or f"--{name.replace('_', '-')}"


def _check_joint(settings: Config | Budgets) -> None:
    if settings.joint and settings.activation_bits != settings.weight_bits:
        raise ConfigError("--joint takes one budget: give --bits alone, without --weight-bits or --activation-bits")
    if settings.joint and settings.size is not None:
        raise ConfigError("--size is a budget for weights only; give it without --joint")


def _check_cost(settings: Config | Budgets) -> None:
    if settings.budget is not None:
        if settings.cost is None:
            raise ConfigError("--budget counts what --cost says; give --cost too, or --bops")
        if settings.joint or settings.size is not None:
            raise ConfigError("--budget takes the place of --joint and --size; give one")
    if settings.layer_limit_activations and settings.layer_limit is None:
        raise ConfigError("--layer-limit-activations says what --layer-limit counts; give --layer-limit too")


def _check_storage(config: Config) -> None:
    storages = TARGETS[config.target].storages
    if config.storage is not None and config.storage not in storages:
        suffix = f" for --target {config.target}" if config.storage in get_args(Storage) else ""
        raise ConfigError(f"--storage {config.storage!r}: choose one of {', '.join(storages)}{suffix}")
    if config.storage == "nbits":
        _check_nbits(config)


def _check_nbits(config: Config) -> None:
    if config.activation_bits is not None:
        raise ConfigError("--storage nbits rounds activations by itself; give --activation-bits none")
    if not set(config.widths) <= set(NBITS):
        raise ConfigError(f"--storage nbits has widths {', '.join(map(str, NBITS))}; give --widths with these alone")
    if any(size & (size - 1) or size > 256 for size in config.block_size or ()):
        raise ConfigError("--storage nbits has blocks of 16, 32, 64, 128 or 256; give --block-size with these or 0")


def _check_goals(config: Config) -> None:
    if sum(getattr(config, name) is not None for name in _GOALS) > 1:
        raise ConfigError("--size, --sqnr and --top1-agreement exclude each other; give one")
    if config.spends_cost and config.joint:
        raise ConfigError("--joint is about --bits; what --cost counts is one budget anyway, so leave it out")


def _check_blocks(config: Config) -> None:
    if config.block_size not in (None, (0,)) and (reason := _one_scale(config)):
        raise ConfigError(f"--block-size: {reason}; leave it out, or give 0")


def _check_minutes(config: Config) -> None:
    if config.minutes is not None and config.effort != "best":
        raise ConfigError("--minutes bounds --effort best: give that as well, or leave --minutes out")


def _one_scale(config: Config) -> str:
    """Return why each channel has one scale, or nothing."""
    if not TARGETS[config.target].folds:
        return f"--target {config.target} takes one scale per channel"
    if config.activation_bits is not None:
        return "beside quantized activations each channel has one scale; --activation-bits none keeps them in float"
    return ""
