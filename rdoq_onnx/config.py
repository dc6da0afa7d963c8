"""Every setting of a run, checked once."""

import math
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from rdoq_onnx.calibration.pixels import Pixels
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.targets import TARGETS, Storage, TargetName

Measure = Literal["taylor", "probe"]
Provider = Literal["auto", "cpu", "cuda"]
Effort = Literal["fast", "default", "best"]
Side = Literal["weights", "activations", "both"]

# Settings that curves do not depend on, or through the samples and the regime only.
NOT_MEASURED = frozenset({
    "activation_bits", "image_mean", "image_scale", "image_std", "joint", "keep_channels", "layer_limit", "max_bytes",
    "min_sqnr", "moved", "pins", "provider", "samples", "size", "sqnr", "storage", "threads", "top1_agreement",
    "weight_bits",
})  # fmt: skip
MAX_BITS = 8
MAX_THREADS = 1024
MAX_SAMPLES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run, named as the command line's options. Raises ConfigError on a value out of range.

    weight_bits, activation_bits: budgets, bits per element on average; `activation_bits` None leaves activations in
        float.
    sqnr, top1_agreement: in place of a budget, the output SQNR in dB, or the share of samples in percent whose top
        class stays, that the emitted model must reach with the fewest bits. moved: the budgets that are lowered for it.
    joint: one budget for weights and activations together; both budgets must then be equal.
    widths: bit widths that a weight channel may take. Activations may take 1 to 8.
    pins: (pattern, bits) of layers or activations whose width is given; "NAME[0:16]" means channels 0 to 15 of a layer.
    exclude: patterns of layers that stay in float. exclude_ops: types of layers that stay in float.
    size: bytes that all weights may take at their widths, in place of `weight_bits`. layer_limit: bytes that those of
        each layer may take.
    samples: how many calibration samples to use, evenly spaced; None for all (64 where they are synthetic).
    image_scale, image_mean, image_std: images become (x · scale - mean) / std; None for what `images.Pixels` takes.
    measure: how curves are measured, "taylor" (first order) or "probe" (exact, slow).
    seed: of all that is random, 0 or more.
    effort: "fast" takes the first allocation, or uniform widths if they measure better; "default" ties curves to exact
        measurements and swaps bits; "best" also rounds and measures again around the allocation, and swaps longer.
    target: the runtime that the file is for; targets.py has its rules.
    storage: how weights are stored, "packed" (exactly their bits), "native" (INT2, INT4, INT8) or "int8"; None for the
        target's default.
    keep_channels: channels of 0 bits stay in the file instead of being folded away.
    threads: threads of ONNX Runtime, 0 to 1024; 0 lets it choose.
    min_sqnr: the least output SQNR in dB that the emitted model must have. max_bytes: the most bytes.
    """

    weight_bits: float = 8.0
    activation_bits: float | None = 8.0
    sqnr: float | None = None
    top1_agreement: float | None = None
    moved: Side = "both"
    joint: bool = False
    widths: tuple[int, ...] = tuple(range(MAX_BITS + 1))
    pins: tuple[tuple[str, int], ...] = ()
    exclude: tuple[str, ...] = ()
    exclude_ops: tuple[str, ...] = ()
    size: int | None = None
    layer_limit: int | None = None
    samples: int | None = None
    image_scale: float | None = None
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    measure: Measure = "taylor"
    effort: Effort = "default"
    seed: int = 0
    provider: Provider = "auto"
    target: TargetName = "onnxruntime"
    storage: Storage | None = None
    keep_channels: bool = False
    threads: int = 0
    min_sqnr: float | None = None
    max_bytes: int | None = None

    def measuring(self) -> dict[str, Any]:
        """The settings that curves depend on; on `activation_bits` they do as far as `measurement.regime` says."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_MEASURED}

    @property
    def pixels(self) -> Pixels:
        return Pixels(self.image_scale, self.image_mean, self.image_std)

    def __post_init__(self) -> None:
        _within("--weight-bits", self.weight_bits, 0, MAX_BITS)
        if self.activation_bits is not None:
            _within("--activation-bits", self.activation_bits, 1, MAX_BITS)
        if self.joint and self.activation_bits != self.weight_bits:
            raise ConfigError("--joint takes one budget: give --bits alone, without --weight-bits or --activation-bits")
        if not self.widths:
            raise ConfigError("--widths names no width; give a range such as 0-8")
        for width in self.widths:
            _within("--widths", width, 0, MAX_BITS)
        if list(self.widths) != sorted(set(self.widths)):
            raise ConfigError(f"--widths {self.widths}: give each width once, in rising order")
        for pattern, bits in self.pins:
            _compiles("--pin", pattern)
            _within(f"--pin {pattern}", bits, 0, MAX_BITS)
        for pattern in self.exclude:
            _compiles("--exclude", pattern)
        if self.samples is not None and self.samples < 2:
            raise ConfigError(f"--samples {self.samples}: at least 2 are needed, one to measure and one to verify")
        if self.samples is not None and self.samples > MAX_SAMPLES:
            raise ConfigError(f"--samples {self.samples}: give at most {MAX_SAMPLES}")
        if self.image_scale is not None:
            _numbers("--image-scale", (self.image_scale,), zero=False)
        _numbers("--image-mean", self.image_mean, zero=True)
        _numbers("--image-std", self.image_std, zero=False)
        if self.measure not in get_args(Measure):
            raise ConfigError(f"--measure {self.measure!r}: choose one of {', '.join(get_args(Measure))}")
        if self.effort not in get_args(Effort):
            raise ConfigError(f"--effort {self.effort!r}: choose one of {', '.join(get_args(Effort))}")
        if self.provider not in get_args(Provider):
            raise ConfigError(f"--provider {self.provider!r}: choose one of {', '.join(get_args(Provider))}")
        if self.target not in TARGETS:
            raise ConfigError(f"--target {self.target!r}: choose one of {', '.join(TARGETS)}")
        storages = TARGETS[self.target].storages
        if self.storage is not None and self.storage not in storages:
            suffix = f" for --target {self.target}" if self.storage in get_args(Storage) else ""
            raise ConfigError(f"--storage {self.storage!r}: choose one of {', '.join(storages)}{suffix}")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed}: give 0 or more")
        if not 0 <= self.threads <= MAX_THREADS:
            raise ConfigError(f"--threads {self.threads}: give 0 (automatic) to {MAX_THREADS}")
        if self.min_sqnr is not None and not math.isfinite(self.min_sqnr):
            raise ConfigError(f"--min-sqnr {self.min_sqnr}: give a finite number of decibels")
        if self.sqnr is not None and not math.isfinite(self.sqnr):
            raise ConfigError(f"--sqnr {self.sqnr}: give a finite number of decibels")
        if self.top1_agreement is not None:
            _within("--top1-agreement", self.top1_agreement, 0, 100)
        if sum(goal is not None for goal in (self.sqnr, self.top1_agreement, self.size)) > 1:
            raise ConfigError("--size, --sqnr and --top1-agreement exclude each other; give one")
        if self.size is not None and self.joint:
            raise ConfigError("--size is a budget of weights alone; give it without --joint")


def parse_widths(text: str) -> tuple[int, ...]:
    """"0-8", "2,4,8" or "4" -> widths in rising order. Raises ConfigError on anything else."""
    widths: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,3})(?:\s*-\s*(\d{1,3}))?\s*", part)
        if not found:
            raise ConfigError(f"--widths {text!r} is no list of widths; give for example 0-8 or 2,4,8")
        first, last = int(found[1]), int(found[2] or found[1])
        widths.update(range(first, last + 1))
    return tuple(sorted(widths))


def parse_bytes(option: str, text: str | None) -> int | None:
    """"1.5MB", "800 kB", "2MiB" or "4096" -> bytes. Raises ConfigError on anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMG]?)(i?)B?\s*", text)
    if not found or (found[3] and not found[2]) or not float(found[1]):
        raise ConfigError(f"{option} {text!r} is no size; give for example 1.5MB, 800kB or 4096")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMG".index((found[2] or " ").upper()))


def parse_numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """"0.485,0.456,0.406" -> numbers. Raises ConfigError on anything else."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text!r} is no list of numbers; give for example 0.485,0.456,0.406") from None


def parse_pin(text: str) -> tuple[str, int]:
    """"PATTERN=BITS" -> (pattern, bits). Raises ConfigError on anything else."""
    pattern, equals, bits = text.rpartition("=")
    if not equals or not pattern or not re.fullmatch(r"\d{1,3}", bits):
        raise ConfigError(f"--pin {text!r} is not PATTERN=BITS; give for example --pin 'conv1.*=8'")
    return pattern, int(bits)


def _numbers(option: str, numbers: tuple[float, ...] | None, zero: bool) -> None:
    if numbers is not None and not (numbers and all(math.isfinite(n) and (n or zero) for n in numbers)):
        raise ConfigError(f"{option} {numbers}: give finite numbers{'' if zero else ' other than 0'}, one a channel")


def _within(option: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{option} {value:g} is out of range; give {low:g} to {high:g}")


def _compiles(option: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{option} {pattern!r} is no regular expression: {error}") from error
