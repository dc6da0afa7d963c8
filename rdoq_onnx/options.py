"""The options of the command line: their declarations, their parsers, and the Config that they make."""

import re
from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any, TypeVar

import click

from rdoq_onnx.config import MAX_BITS, Config, Side
from rdoq_onnx.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--bits", default="8", metavar="B",
        help="Average bits per weight and per activation element, 1 to 8; fractions are fine. Several, such as "
        "2,3,4, with {bits} in OUTPUT, make as many files of one measurement."),
    click.option("--weight-bits", metavar="B", help="The same for weights alone, 0 to 8.  [default: --bits]"),
    click.option("--activation-bits", metavar="B|none",
        help="The same for activations alone, 1 to 8; none leaves them in float.  [default: --bits]"),
    click.option("--joint", is_flag=True, help="Spend --bits as one budget over weights and activations together."),
    click.option("--size", metavar="BYTES",
        help="Budget of the weights in all, in place of --weight-bits: 1.5MB, 800kB."),
    click.option("--layer-limit", metavar="BYTES", help="The most bytes that the weights of any layer may take."),
    click.option("--sqnr", type=float, metavar="DB",
        help="Find the fewest bits with which the output SQNR is DB decibels or more."),
    click.option("--top1-agreement", type=float, metavar="PERCENT",
        help="Find the fewest bits with which the top class of that share of the samples stays."),
    click.option("--widths", default="0-8", metavar="LIST",
        help="Widths that a weight channel may take, in bits, such as 0-8 or 2,4,8. Beside quantized "
        "activations 8 means 7."),
    click.option("--pin", multiple=True, metavar="PATTERN=BITS",
        help="Fix the width of the layers and activations whose name is PATTERN or matches it as a regular "
        "expression; NAME[0:16] means channels 0 to 15 of a layer; may be repeated."),
    click.option("--exclude", multiple=True, metavar="PATTERN",
        help="Leave the layers of that name or regular expression in float; may be repeated."),
    click.option("--exclude-op", multiple=True, metavar="TYPE",
        help="Leave the layers of that type, such as Gemm, in float; may be repeated."),
    click.option("--calibration", metavar="PATH",
        help="Samples: an .npz with one array per input, or an .npy; axis 0 counts them. Or a folder of images, "
        ".npy, .npz or test_data_set_*/input_*.pb files; or module:function, which gives feeds.  "
        "[default: synthetic]"),
    click.option("--samples", type=int, metavar="N",
        help="Use N samples, evenly spaced, a seventh of them to verify; at least 2.  "
        "[default: all, or 64 synthetic ones]"),
    click.option("--image-mean", metavar="LIST",
        help="Images become (x * scale - mean) / std; a number for each channel, or one.  [default: ImageNet's]"),
    click.option("--image-std", metavar="LIST", help="See --image-mean.  [default: ImageNet's]"),
    click.option("--image-scale", type=float, metavar="X", help="See --image-mean.  [default: 1/255]"),
    click.option("--measure", default="taylor", metavar="taylor|probe",
        help="Curves to first order, or exact and slow."),
    click.option(
        "--effort",
        default="default",
        show_default=True,
        metavar="fast|default|best",
        help="How long to look for something better than the first allocation.",
    ),
    click.option("--target", default="onnxruntime", metavar="NAME",
        help="The runtime that the file is for: onnxruntime, openvino or tensorrt."),
    click.option("--storage", metavar="packed|native|int8",
        help="Weights at exactly their bits, decoded at load; as INT2, INT4 and INT8; or as INT8.  "
        "[default: packed, openvino: native, tensorrt: int8]"),
    click.option("--keep-channels", is_flag=True, help="Keep channels of 0 bits instead of folding them away."),
    click.option("--seed", type=int, default=0, metavar="N", help="Seed of all that is random, 0 or more."),
    click.option("--provider", default="auto", metavar="auto|cpu|cuda",
        help="Where ONNX Runtime measures; auto takes CUDA where it is there."),
    click.option("--threads", type=int, default=0, metavar="N", help="Threads of ONNX Runtime; 0 lets it choose."),
    click.option("--curves", metavar="FILE",
        help="Keep what is measured in FILE as it goes on; what FILE has is not measured again."),
    click.option("--modified", metavar="FILE",
        help="Also write the modified network F~ (an Add behind everything perturbed) as ONNX."),
    click.option("--json", metavar="FILE", help="Also write the report as JSON."),
    click.option("--report", metavar="FILE", help="Also write a page of plots and tables, for a browser: FILE.html."),
    click.option("--min-sqnr", type=float, metavar="DB",
        help="Write nothing and exit with 4 if the output SQNR is under DB decibels."),
    click.option("--max-bytes", metavar="BYTES", help="Write nothing and exit with 4 if the file would be larger."),
    click.option("--dry-run", is_flag=True,
        help="List layers, activations, what stays in float and the time that it would take; write nothing."),
    click.option("--quiet", is_flag=True, help="Print errors only."),
    click.option("--verbose", is_flag=True, help="Also list all layers and activations with their widths."),
)


def declared(command: F) -> F:
    """`command` with all options of a run, in the order in which --help lists them."""
    return reduce(lambda function, option: option(function), reversed(_OPTIONS), command)


def make_config(typed: Mapping[str, Any]) -> Config:
    """Turn the options of a run into its Config; `typed` holds all that concern it, as click gives them.

    Raises ConfigError.
    """
    bits, weight_bits, activation_bits = (typed[name] for name in _BUDGETS)
    if typed["size"] is not None and weight_bits is not None:
        raise ConfigError("--size and --weight-bits are both budgets of the weights; give one")
    if (typed["sqnr"], typed["top1_agreement"]) != (None, None) and None not in (weight_bits, activation_bits):
        raise ConfigError("--sqnr and --top1-agreement need a budget to lower: leave out --weight-bits")

    def side(option: str, text: str | None, least: int) -> float:
        # Where --bits speaks for activations too, it may not be less than they take.
        shared = 0 if activation_bits is not None else 1
        return _number("--bits", bits, shared) if text is None else _number(option, text, least)

    weights = side("--weight-bits", weight_bits, 0)
    activations = None if activation_bits == "none" else side("--activation-bits", activation_bits, 1)
    moved = _moved(weight_bits, activation_bits)
    rest = {_FIELDS.get(name, name): _parsed(name, value) for name, value in typed.items() if name not in _BUDGETS}
    return Config(weight_bits=weights, activation_bits=activations, moved=moved, **rest)


def _parsed(name: str, value: Any) -> Any:
    return _PARSERS[name](value) if name in _PARSERS else value


def _moved(weight_bits: str | None, activation_bits: str | None) -> Side:
    """The budgets that --sqnr lowers: those that are not given one by one."""
    if weight_bits is None and activation_bits is None:
        return "both"
    return "weights" if weight_bits is None else "activations"


def _number(option: str, text: str, least: int) -> float:
    """A number of bits, checked here so that the error names the option that was typed."""
    try:
        value = float(text)
    except ValueError:
        expected = "a number or none" if option == "--activation-bits" else "a number"
        raise ConfigError(f"{option} {text!r} is not {expected}; give {least} to {MAX_BITS}") from None
    if not least <= value <= MAX_BITS:
        aside = "; --weight-bits and --activation-bits set one side alone" if option == "--bits" else ""
        raise ConfigError(f"{option} {text} is out of range; give {least} to {MAX_BITS}{aside}")
    return value


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


_BUDGETS = ("bits", "weight_bits", "activation_bits")  # read together
_FIELDS = {"pin": "pins", "exclude_op": "exclude_ops"}  # options whose field of Config has another name
# One for each option that Config does not take as click gives it.
_PARSERS: Mapping[str, Callable[[Any], Any]] = {
    "widths": parse_widths,
    "pin": lambda typed: tuple(map(parse_pin, typed)),
    "exclude": tuple,
    "exclude_op": tuple,
    "size": partial(parse_bytes, "--size"),
    "layer_limit": partial(parse_bytes, "--layer-limit"),
    "max_bytes": partial(parse_bytes, "--max-bytes"),
    "image_mean": partial(parse_numbers, "--image-mean"),
    "image_std": partial(parse_numbers, "--image-std"),
}
