"""Every setting is checked once, by Config and the parsers of options."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdoq_onnx.config import BLOCKS, Budgets, Config
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.cost_rows import Amount, preset
from rdoq_onnx.options import parse_blocks, parse_pin, parse_widths
from rdoq_onnx.targets import TARGETS


def test_defaults_are_eight_bits_and_all_widths() -> None:
    config = Config()
    assert (config.weight_bits, config.activation_bits) == (8, 8)
    assert config.widths == (0, 1, 2, 3, 4, 5, 6, 7, 8)


def test_config_is_frozen_and_refuses_unknown_settings() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError, match="wieght_bits"):
        Config(wieght_bits=4)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": -0.1}, "--weight-bits -0.1 is out of range; give 0 to 8"),
        ({"weight_bits": 8.5}, "--weight-bits 8.5"),
        ({"weight_bits": math.nan}, "--weight-bits nan"),
        ({"weight_bits": math.inf}, "--weight-bits inf"),
        ({"activation_bits": 0.5}, "--activation-bits 0.5 is out of range; give 1 to 8"),
        ({"activation_bits": math.nan}, "--activation-bits nan"),
        ({"activation_bits": 9.0}, "--activation-bits 9"),
        ({"joint": True, "weight_bits": 4.0}, "--joint takes one budget"),
        ({"joint": True, "activation_bits": None}, "--joint takes one budget"),
        ({"widths": ()}, "--widths is empty"),
        ({"widths": (2, 9)}, "--widths 9 is out of range"),
        ({"widths": (4, 2)}, "in rising order"),
        ({"widths": (2, 2)}, "each width once"),
        ({"block_size": (32,)}, "--block-size: beside quantized activations each channel has one scale; --activation"),
        ({"block_size": (8,), "activation_bits": None}, "--block-size 8 is out of range; give 16 to 4096"),
        ({"block_size": (64, 32), "activation_bits": None}, "in rising order; 0 is a whole channel"),
        ({"block_size": (), "activation_bits": None}, "give one size or more"),
        (
            {"block_size": (0, 32), "activation_bits": None, "target": "tensorrt"},
            "tensorrt takes one scale per channel",
        ),
        ({"pins": (("conv", 9),)}, "--pin conv 9 is out of range"),
        ({"pins": (("(", 4),)}, r"--pin '\(' is not a valid regular expression"),
        ({"exclude": ("(",)}, r"--exclude '\(' is not a valid regular expression"),
        ({"samples": 1}, "--samples 1: at least 2"),
        ({"samples": 0}, "--samples 0: at least 2"),
        ({"samples": 10**12}, "--samples 1000000000000: give at most 1000000"),
        ({"measure": "guess"}, "choose one of taylor, probe"),
        ({"provider": "tpu"}, "choose one of auto, cpu, cuda"),
        ({"seed": -1}, "--seed -1: give 0 or more"),
        ({"threads": -1}, "--threads -1"),
        ({"threads": 2**40}, "--threads 1099511627776"),
        ({"image_scale": 0.0}, r"--image-scale \(0.0,\): give finite numbers other than 0, one per channel"),
        ({"image_mean": ()}, r"--image-mean \(\): give finite numbers, one per channel"),
        ({"image_std": (1.0, 0.0)}, r"--image-std \(1.0, 0.0\): give finite numbers other than 0"),
        ({"effort": "none"}, "--effort 'none': choose one of fast, default, best"),
        ({"target": "none"}, "--target 'none': choose one of onnxruntime, openvino, tensorrt"),
        ({"storage": "none"}, "--storage 'none': choose one of packed, native, int8, nbits$"),
        ({"target": "tensorrt", "storage": "packed"}, "--storage 'packed': .* for --target tensorrt"),
        ({"storage": "nbits"}, "--storage nbits rounds activations by itself; give --activation-bits none"),
        (
            {"storage": "nbits", "activation_bits": None, "widths": (2, 3)},
            "--storage nbits has widths 0, 2, 4, 8; give",
        ),
        (
            {"storage": "nbits", "activation_bits": None, "block_size": (0, 48)},
            "blocks of 16, 32, 64, 128 or 256; give",
        ),
        (
            {"storage": "nbits", "target": "openvino"},
            "--storage 'nbits': choose one of native, int8 for --target openvino",
        ),
        ({"top1_agreement": 101.0}, "--top1-agreement 101 is out of range; give 0 to 100"),
        ({"sqnr": math.inf}, "--sqnr inf: give a finite number of decibels"),
        ({"sqnr": 20.0, "size": 100}, "--size, --sqnr and --top1-agreement exclude each other"),
        ({"joint": True, "size": 100}, "--size is a budget for weights only"),
        ({"budget": Amount(5)}, "--budget counts what --cost says; give --cost too, or --bops"),
        ({"budget": Amount(0), "cost": preset("bops")}, "--budget 0: give a number above 0"),
        ({"budget": Amount(1e9, True), "cost": preset("bops")}, "--budget 1e[+]09% is out of range; give at most"),
        ({"budget": Amount(5), "cost": preset("bops"), "size": 9}, "--budget takes the place of --joint and --size"),
        ({"cost": preset("bops"), "sqnr": 9.0, "joint": True}, "--joint is about --bits; what --cost counts is one"),
        ({"layer_limit_activations": True}, "--layer-limit-activations says what --layer-limit counts"),
        ({"min_sqnr": math.nan}, "--min-sqnr nan"),
        ({"min_sqnr": math.inf}, "--min-sqnr inf"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 8.5}, "--weight-bits 8.5 is out of range; give 0 to 8"),
        ({"activation_bits": 0.5}, "--activation-bits 0.5 is out of range; give 1 to 8"),
        ({"pins": (("(", 4),)}, r"--pin '\(' is not a valid regular expression"),
        ({"joint": True, "weight_bits": 4.0}, "--joint takes one budget"),
        ({"joint": True, "size": 100}, "--size is a budget for weights only"),
        ({"budget": Amount(5)}, "--budget counts what --cost says; give --cost too, or --bops"),
        ({"budget": Amount(0), "cost": preset("bops")}, "--budget 0: give a number above 0"),
        ({"budget": Amount(1e9, True), "cost": preset("bops")}, "--budget 1e[+]09% is out of range; give at most"),
        ({"budget": Amount(5), "cost": preset("bops"), "size": 9}, "--budget takes the place of --joint and --size"),
        ({"layer_limit_activations": True}, "--layer-limit-activations says what --layer-limit counts"),
    ],
)
def test_budgets_are_checked_as_config_checks_them(settings: dict[str, object], message: str) -> None:
    for checked in (Budgets, Config):
        with pytest.raises(ConfigError, match=message):
            checked(**settings)


def test_views_hold_the_settings_of_the_same_names() -> None:
    config = Config(weight_bits=3, activation_bits=None, size=9, pins=(("a", 2),), exclude=("b",), target="openvino")
    assert config.budgets == Budgets(weight_bits=3, activation_bits=None, size=9, pins=(("a", 2),))
    assert Config().budgets == Budgets()
    selection = config.selection
    assert (selection.target, selection.exclude, selection.pins) == (TARGETS["openvino"], ("b",), (("a", 2),))
    assert not selection.activations
    assert Config().selection.activations


def test_blocks_are_offered_beside_float_activations_only() -> None:
    assert Config().selection.blocks == (0,)
    assert Config(block_size=(0,)).selection.blocks == (0,)
    assert Config(activation_bits=None).selection.blocks == BLOCKS == (0, 32, 64, 128)
    assert Config(activation_bits=None, target="tensorrt").selection.blocks == (0,)
    assert Config(activation_bits=None, block_size=(32,)).selection.blocks == (32,)


@pytest.mark.parametrize(("text", "sizes"), [("0", (0,)), ("0,32,64", (0, 32, 64)), (" 128 ,32, 32", (32, 128))])
def test_block_sizes_are_parsed(text: str, sizes: tuple[int, ...]) -> None:
    assert parse_blocks(text) == sizes
    assert parse_blocks(None) is None


@pytest.mark.parametrize("text", ["", "two", "32-64", "-1", "32,,64", "9" * 30])
def test_malformed_block_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--block-size .* is not a list of sizes; give for example 0,32,64,128"):
        parse_blocks(text)


def test_nbits_takes_the_widths_that_its_operator_has() -> None:
    assert Config(storage="nbits", activation_bits=None).widths == (0, 2, 4, 8)
    assert Config(storage="nbits", activation_bits=None, widths=(4,)).widths == (4,)
    assert Config(storage="nbits", activation_bits=None).budgets.storage == "nbits"


@given(st.floats(0, 8), st.floats(1, 8) | st.none())
def test_every_budget_in_range_is_taken(weights: float, activations: float | None) -> None:
    config = Config(weight_bits=weights, activation_bits=activations)
    assert (config.weight_bits, config.activation_bits) == (weights, activations)


@pytest.mark.parametrize(
    ("text", "widths"),
    [("0-8", tuple(range(9))), ("2,4,8", (2, 4, 8)), ("4", (4,)), ("8,2-3", (2, 3, 8)), (" 1 - 2 , 1", (1, 2))],
)
def test_widths_are_parsed(text: str, widths: tuple[int, ...]) -> None:
    assert parse_widths(text) == widths


@given(st.sets(st.integers(0, 8), min_size=1))
def test_any_list_of_widths_is_parsed(widths: set[int]) -> None:
    parsed = parse_widths(",".join(map(str, widths)))
    assert parsed == tuple(sorted(widths))
    assert Config(widths=parsed).widths == parsed


@pytest.mark.parametrize("text", ["", "two", "2;4", "-1", "1.5", "2,,4", "0-999999999999", "²"])
def test_malformed_widths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--widths .* is not a list of widths; give for example 0-8"):
        parse_widths(text)


@pytest.mark.parametrize(
    ("text", "pin"), [("conv=8", ("conv", 8)), ("a=b=0", ("a=b", 0)), ("/0/.*Conv=12", ("/0/.*Conv", 12))]
)
def test_pins_are_parsed(text: str, pin: tuple[str, int]) -> None:
    assert parse_pin(text) == pin


@pytest.mark.parametrize(
    "text", ["", "conv", "conv=", "=8", "conv=x", "conv=-1", "conv=2.5", "conv=²", "conv=" + "9" * 5000]
)
def test_malformed_pins_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not PATTERN=BITS; give for example"):
        parse_pin(text)
