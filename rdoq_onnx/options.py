"""Declare and parse the options of the command line, and make the Config from them."""

import re
from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any, TypeVar

import click

from rdoq_onnx.config import MAX_BITS, Config, Side
from rdoq_onnx.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--bits",
        show_default="8",
        metavar="B",
        help="Average bits per weight and per activation element, 1 to 8; fractions are allowed. A list such as 2,3,4, "
        "with {bits} in OUTPUT, writes one file per budget from one measurement.",
    ),
    click.option("--weight-bits", metavar="B", help="The same for weights only, 0 to 8.  [default: --bits]"),
    click.option(
        "--activation-bits",
        metavar="B|none",
        help="The same for activations only, 1 to 8; none keeps them in float.  [default: --bits]",
    ),
    click.option("--joint", is_flag=True, help="Spend --bits as one budget over weights and activations."),
    click.option(
        "--size",
        metavar="BYTES",
        help="Total size of the weights at their widths, instead of --weight-bits: 1.5MB, 800kB.",
    ),
    click.option("--layer-limit", metavar="BYTES", help="Maximum size of any layer's weights, e.g. an on-chip buffer."),
    click.option(
        "--layer-limit-activations",
        is_flag=True,
        help="Count a layer's input and output of one sample in --layer-limit, too.",
    ),
    click.option(
        "--cost",
        metavar="FILE|size|bops|measured",
        help="What each layer costs by its widths, to report, and to spend --budget on: a CSV file of layer, "
        "weight_bits, activation_bits, cost; bytes of weights; bit operations; or microseconds in ONNX Runtime here. "
        "--sqnr and --top1-agreement then seek the least of it.",
    ),
    click.option(
        "--budget",
        metavar="X|P%",
        help="What all layers may cost, in the unit of --cost or as a percentage of 8 bits everywhere, in place of "
        "--bits and --size: 12G, 40%. A list such as 30%,40%, with {budget} in OUTPUT, writes several files.",
    ),
    click.option("--bops", metavar="X", help="Short for --cost bops --budget X."),
    click.option("--latency", metavar="TIME", help="Short for --cost measured --budget TIME, such as 3ms."),
    click.option(
        "--interpolate",
        is_flag=True,
        help="Widths between those of two rows of the --cost file cost what the line between them says.  "
        "[default: they are not allowed]",
    ),
    click.option(
        "--cost-template",
        metavar="FILE",
        help="Write the rows of this model for --cost FILE, with the costs of --cost if given; without OUTPUT nothing "
        "else.",
    ),
    click.option(
        "--sqnr",
        type=float,
        metavar="DB",
        help="Find the fewest bits that give the emitted model an output SQNR of at least DB decibels.",
    ),
    click.option(
        "--top1-agreement",
        type=float,
        metavar="PERCENT",
        help="Find the fewest bits with which at least this percentage of the samples keep their top class.",
    ),
    click.option(
        "--widths",
        default="0-8",
        metavar="LIST",
        help="Widths allowed for weight channels, in bits, such as 0-8 or 2,4,8. Beside quantized activations 8 "
        "means 7.",
    ),
    click.option(
        "--block-size",
        metavar="LIST",
        help="Beside float activations: numbers of consecutive weights of a channel that may share a scale of 16 bits; "
        "0 for all of them, and the bits of such scales are not counted.  [default: 0,32,64,128]",
    ),
    click.option(
        "--pin",
        multiple=True,
        metavar="PATTERN=BITS",
        help="Fix the width of layers and activations by name or regular expression; NAME[0:16] selects channels 0 to "
        "15 of a layer; repeatable.",
    ),
    click.option(
        "--exclude",
        multiple=True,
        metavar="PATTERN",
        help="Keep layers in float by name or regular expression; repeatable.",
    ),
    click.option(
        "--exclude-op",
        multiple=True,
        metavar="TYPE",
        help="Keep layers of this type, such as Gemm, in float; repeatable.",
    ),
    click.option(
        "--calibration",
        metavar="PATH",
        help="Samples: an .npz with one array per input, or an .npy, with the samples on axis 0; a folder of images, "
        ".npy, .npz or test_data_set_*/input_*.pb files; or module:function, which returns feeds.  "
        "[default: synthetic]",
    ),
    click.option(
        "--validation",
        metavar="PATH",
        help="Samples for --sqnr, --top1-agreement, --min-sqnr and the figures alone, as for --calibration.  "
        "[default: some of the calibration samples]",
    ),
    click.option(
        "--samples",
        type=int,
        metavar="N",
        help="Use N samples, evenly spaced, at least 2; a seventh of them verifies the result.  "
        "[default: all, or 64 synthetic ones]",
    ),
    click.option(
        "--image-mean",
        metavar="LIST",
        help="Images become (x * scale - mean) / std; one number per channel, or one for all.  [default: ImageNet's]",
    ),
    click.option("--image-std", metavar="LIST", help="See --image-mean.  [default: ImageNet's]"),
    click.option("--image-scale", type=float, metavar="X", help="See --image-mean.  [default: 1/255]"),
    click.option(
        "--measure", default="taylor", metavar="taylor|probe", help="First-order curves, or exact ones, which is slow."
    ),
    click.option(
        "--distortion",
        default="auto",
        show_default=True,
        metavar="mse|kl|auto",
        help="What to minimize: the squared error of the outputs; of rows of logits, their divergence KL(p||p~); or "
        "the divergence of language models at few bits, else where it falls at little cost in squared error.",
    ),
    click.option(
        "--effort",
        default="default",
        show_default=True,
        metavar="fast|default|best",
        help="How much to refine the first allocation.",
    ),
    click.option(
        "--target",
        default="onnxruntime",
        metavar="NAME",
        help="Runtime that will run the file: onnxruntime, openvino or tensorrt.",
    ),
    click.option(
        "--storage",
        metavar="packed|native|int8|nbits",
        help="Store weights at exactly their bits, decoded at load; as INT2, INT4 and INT8; as INT8; or in ONNX "
        "Runtime's MatMulNBits, packed in memory, too.  "
        "[default: packed, openvino: native, tensorrt: int8]",
    ),
    click.option(
        "--keep-channels", is_flag=True, help="Keep 0-bit channels instead of folding them into the biases behind them."
    ),
    click.option("--seed", type=int, default=0, metavar="N", help="Seed of everything random, 0 or more."),
    click.option(
        "--provider",
        default="auto",
        metavar="auto|cpu|cuda",
        help="Execution provider for the measurement; auto takes CUDA if a small model runs there.",
    ),
    click.option(
        "--minutes",
        type=float,
        metavar="N",
        help="What a run of --effort best should take; becomes a number of tuning steps.",
    ),
    click.option(
        "--threads", type=int, default=0, metavar="N", help="Threads of ONNX Runtime, numpy and BLAS; 0 for all cores."
    ),
    click.option(
        "--workers",
        metavar="N|auto|ray://HOST:PORT",
        help="Compute sums over the samples in N processes, or on a Ray cluster; needs the extra [ray].",
    ),
    click.option(
        "--scratch",
        metavar="FOLDER",
        help="Folder for what large networks keep on the disk during a run.  [default: the system's temporary folder]",
    ),
    click.option(
        "--memory",
        metavar="BYTES",
        help="Memory that a run should not exceed, e.g. 4GB.  [default: a third of the machine's]",
    ),
    click.option(
        "--curves",
        metavar="FILE",
        help="Checkpoint the measurement in FILE as it proceeds; skip what FILE already holds. A pattern such as "
        "'part*.npz' merges the files of all shards, which are only read.",
    ),
    click.option(
        "--shard",
        metavar="K/N",
        help="Only compute the K-th of N shares of the sums over the samples, into the file of --curves; no OUTPUT.",
    ),
    click.option(
        "--modified",
        metavar="FILE",
        help="Also write the modified network F~, with an Add at each perturbed tensor, as ONNX.",
    ),
    click.option("--json", metavar="FILE", help="Also write the report as JSON."),
    click.option("--report", metavar="FILE", help="Also write the report as one HTML file with plots."),
    click.option(
        "--min-sqnr",
        type=float,
        metavar="DB",
        help="Write nothing and exit with 4 if the output SQNR is below DB decibels.",
    ),
    click.option("--max-bytes", metavar="BYTES", help="Write nothing and exit with 4 if the file would be larger."),
    click.option(
        "--dry-run",
        is_flag=True,
        help="List layers, activations, what stays in float and estimates of time and space; write nothing.",
    ),
    click.option("--quiet", is_flag=True, help="Print errors only."),
    click.option(
        "--verbose", is_flag=True, help="Also list layers and activations with their widths, and each node in float."
    ),
)


def declared(command: F) -> F:
    """Add all options of a run to `command`, in the order of --help."""
    return reduce(lambda function, option: option(function), reversed(_OPTIONS), command)


def make_config(typed: Mapping[str, Any]) -> Config:
    """Make the Config of a run from its options `typed`, as click returns them; `cost` and `budget` parsed.

    Raises ConfigError.
    """
    _check_one_budget(typed)
    bits, weight_bits, activation_bits = (typed[name] for name in _BUDGETS)
    bits = "8" if bits is None else bits
    if typed["size"] is not None and weight_bits is not None:
        raise ConfigError("--size and --weight-bits are both budgets of the weights; give one")
    if (typed["sqnr"], typed["top1_agreement"]) != (None, None) and None not in (weight_bits, activation_bits):
        raise ConfigError("--sqnr and --top1-agreement need a budget to lower: leave out --weight-bits")

    def side(option: str, text: str | None, least: int) -> float:
        # If --bits also sets the activations, their minimum applies.
        shared = 0 if activation_bits is not None else 1
        return _number("--bits", bits, shared) if text is None else _number(option, text, least)

    weights = side("--weight-bits", weight_bits, 0)
    activations = None if activation_bits == "none" else side("--activation-bits", activation_bits, 1)
    moved = _moved(weight_bits, activation_bits)
    rest = {_FIELDS.get(name, name): _parsed(name, value) for name, value in typed.items() if name not in _BUDGETS}
    return Config(weight_bits=weights, activation_bits=activations, moved=moved, **rest)


def _check_one_budget(typed: Mapping[str, Any]) -> None:
    """A budget of a cost takes the place of those of bits; --activation-bits none is no budget."""
    goal = next((f"--{n.replace('_', '-')}" for n in ("sqnr", "top1_agreement") if typed[n] is not None), None)
    if typed["budget"] is None and (goal is None or typed["cost"] is None):
        return
    others = ("bits", "weight_bits", "activation_bits", "size", "joint")
    other = next((f"--{n.replace('_', '-')}" for n in others if typed[n] not in (None, False, "none")), None)
    if other is not None and typed["budget"] is None:
        raise ConfigError(f"{goal} lowers what --cost counts, not {other}; leave {other} out, --budget limits the cost")
    if other is not None:
        raise ConfigError(f"--budget takes the place of {other}; give one")


def _parsed(name: str, value: Any) -> Any:
    return _PARSERS[name](value) if name in _PARSERS else value


def _moved(weight_bits: str | None, activation_bits: str | None) -> Side:
    """Return the budgets that a goal such as --sqnr lowers: those without an option of their own."""
    if weight_bits is None and activation_bits is None:
        return "both"
    return "weights" if weight_bits is None else "activations"


def _number(option: str, text: str, least: int) -> float:
    """Parse a number of bits, here so that the error names the option that was typed."""
    try:
        value = float(text)
    except ValueError:
        expected = "a number or none" if option == "--activation-bits" else "a number"
        raise ConfigError(f"{option} {text!r} is not {expected}; give {least} to {MAX_BITS}") from None
    if not least <= value <= MAX_BITS:
        hint = "; --weight-bits and --activation-bits set one side only" if option == "--bits" else ""
        raise ConfigError(f"{option} {text} is out of range; give {least} to {MAX_BITS}{hint}")
    return value


def parse_widths(text: str) -> tuple[int, ...]:
    """Parse "0-8", "2,4,8" or "4" into widths in rising order. Raises ConfigError on anything else."""
    widths: set[int] = set()
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,3})(?:\s*-\s*(\d{1,3}))?\s*", part)
        if not ends:
            raise ConfigError(f"--widths {text!r} is not a list of widths; give for example 0-8 or 2,4,8")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        widths.update(range(first, last + 1))
    return tuple(sorted(widths))


def parse_blocks(text: str | None) -> tuple[int, ...] | None:
    """Parse "0,32,64" into sizes in rising order. Raises ConfigError on anything else."""
    if text is None:
        return None
    if not re.fullmatch(r"\s*\d{1,9}\s*(,\s*\d{1,9}\s*)*", text):
        raise ConfigError(f"--block-size {text!r} is not a list of sizes; give for example 0,32,64,128")
    return tuple(sorted(set(map(int, text.split(",")))))


def parse_bytes(option: str, text: str | None) -> int | None:
    """Parse "1.5MB", "800 kB", "2MiB" or "4096" into bytes. Raises ConfigError on anything else."""
    if text is None:
        return None
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMG]?)(i?)B?\s*", text)
    if not parts or (parts[3] and not parts[2]) or not float(parts[1]):
        raise ConfigError(f"{option} {text!r} is not a valid size; give for example 1.5MB, 800kB or 4096")
    # A size beyond all files is out of range, which Config reports; int() would fail on infinity.
    return int(min(float(parts[1]), 1e18) * (1024 if parts[3] else 1000) ** " KMG".index((parts[2] or " ").upper()))


def parse_numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Parse "0.485,0.456,0.406" into numbers. Raises ConfigError on anything else."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not a list of numbers; give for example 0.485,0.456,0.406") from None


def parse_pin(text: str) -> tuple[str, int]:
    """Parse "PATTERN=BITS" into (pattern, bits). Raises ConfigError on anything else."""
    pattern, equals, bits = text.rpartition("=")
    if not equals or not pattern or not re.fullmatch(r"\d{1,3}", bits):
        raise ConfigError(f"--pin {text!r} is not PATTERN=BITS; give for example --pin 'conv1.*=8'")
    return pattern, int(bits)


_BUDGETS = ("bits", "weight_bits", "activation_bits")  # parsed together
_FIELDS = {"pin": "pins", "exclude_op": "exclude_ops"}  # options whose field in Config has another name
# For each option whose value click returns in another form than Config takes.
_PARSERS: Mapping[str, Callable[[Any], Any]] = {
    "widths": parse_widths,
    "block_size": parse_blocks,
    "pin": lambda typed: tuple(map(parse_pin, typed)),
    "exclude": tuple,
    "exclude_op": tuple,
    "size": partial(parse_bytes, "--size"),
    "layer_limit": partial(parse_bytes, "--layer-limit"),
    "max_bytes": partial(parse_bytes, "--max-bytes"),
    "memory": partial(parse_bytes, "--memory"),
    "image_mean": partial(parse_numbers, "--image-mean"),
    "image_std": partial(parse_numbers, "--image-std"),
}
