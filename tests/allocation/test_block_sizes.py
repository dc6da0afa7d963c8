"""The choice of block sizes against all choices there are, on small tables."""

import itertools
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdoq_onnx.allocation.allocate import solve
from rdoq_onnx.allocation.block_sizes import Room, choose_blocks, chosen, fewest_scales
from rdoq_onnx.allocation.budget import allocate_bits, uniform_bits
from rdoq_onnx.config import Budgets
from rdoq_onnx.curves.curves import Curves
from rdoq_onnx.curves.measurement import BlockOption, MeasuredLayer, Measurement, block_bits
from rdoq_onnx.errors import BudgetError
from rdoq_onnx.model.layers import Layer, Use
from rdoq_onnx.model.linear import Linear

BLOCKS = (0, 32, 64)
BITS = np.arange(9)


class Net:
    """What Measurement reads of a network."""

    def __init__(self, layers):
        self.layers, self.activations, self.searched = layers, (), layers

    def names(self, layer):
        return (layer.name,)


def table(seed, layers=3, gain=0.5, blocks=BLOCKS):
    """Layers of 128 x 3 weights with random curves; smaller blocks distort less, by about `gain` each."""
    rng = np.random.default_rng(seed)
    linear = Linear("MatMul", (128, 3))
    made = [Layer(f"m{k}", f"w{k}", linear, (Use(f"m{k}", "x", "y", linear),), blocks) for k in range(layers)]
    measured = []
    for layer in made:
        curves = rng.lognormal(0, 1, (3, 1)) * 4.0**-BITS * rng.uniform(0.9, 1.1, (3, 9))
        options = []
        for k, size in enumerate(blocks):
            factor = gain ** (k * rng.uniform(0, 1.5)) if k else 1.0
            options.append(BlockOption(size, {}, curves * factor))
        measured.append(MeasuredLayer(layer, {}, np.zeros(1), options=tuple(options)))
    curves = Curves(BITS, np.full(3 * layers, 128), np.concatenate([m.options[0].distortion for m in measured]))
    unused = {f.name: None for f in fields(Measurement)}
    return Measurement(**unused | {"network": Net(made), "curves": curves, "layers": tuple(measured)})


def every_choice(measurement):
    counts = [range(len(x.options)) for x in measurement.layers]
    return [chosen(measurement, picked) for picked in itertools.product(*counts)]


@given(st.integers(0, 500), st.floats(0.5, 7))
def test_near_the_best_of_all_choices_and_above_the_bound(seed, bits):
    measurement = table(seed)
    budget = int(bits * 128 * 9)
    found, bound = choose_blocks(measurement, np.ones((9, 9), bool), Room(budget))
    solution = solve(found.curves, budget)
    reached = []
    for other in every_choice(measurement):
        try:
            reached.append(solve(other.curves, budget).distortion)
        except BudgetError:
            continue
    assert solution.rate <= budget
    assert bound <= min(reached) * (1 + 1e-9)
    # No more than the bits that are left, at the slope of the curves, where one layer changes its blocks.
    assert solution.distortion <= max(2 * min(reached), min(reached) + 3 * solution.slope * 128 * 3)


def test_blocks_pay_only_where_they_gain_more_than_their_bits():
    clear, useless = table(1, gain=0.05), table(1, gain=0.999)
    budget = 4 * 128 * 9
    allowed = np.ones((9, 9), bool)
    assert any(x.block for x in choose_blocks(clear, allowed, Room(budget))[0].layers)
    assert not any(x.block for x in choose_blocks(useless, allowed, Room(budget))[0].layers)


def test_the_bits_of_scales_are_part_of_the_budget():
    measurement = table(2, gain=0.05)
    allocation = allocate_bits(measurement, Budgets(weight_bits=4, activation_bits=None))
    layers, bits = allocation.measurement.layers, allocation.bits
    scales = sum(3 * 16 * (128 // x.block) for x in layers if x.block)
    assert scales
    assert allocation.weight_payload == (bits * 128).sum() + scales <= 4 * 9 * 128
    assert allocation.weight_average == allocation.weight_payload / (9 * 128)
    assert 0 <= allocation.gap < 0.2


@pytest.mark.parametrize("size", [0, 32, 64])
def test_bits_of_the_scales_of_a_channel(size):
    layer = table(0).layers[0].layer
    assert block_bits(layer, size) == {0: 0, 32: 64, 64: 32}[size]


def test_one_width_everywhere_has_one_scale_a_channel():
    uniform = uniform_bits(table(3, gain=0.05), Budgets(weight_bits=4, activation_bits=None))
    assert (uniform.bits == 4).all()
    assert not any(x.block for x in uniform.measurement.layers)
    assert [x.block for x in fewest_scales(table(3, blocks=(32, 64))).layers] == [64, 64, 64]


def test_pins_and_weighed_curves_keep_the_blocks():
    measurement = table(4, gain=0.05)
    pinned = allocate_bits(measurement, Budgets(weight_bits=4, activation_bits=None, pins=(("m0", 3),)))
    assert set(pinned.layer_bits[0].tolist()) == {3}
    again = allocate_bits(pinned.measurement, Budgets(weight_bits=6, activation_bits=None), np.ones(9), 0.0)
    assert [x.block for x in again.measurement.layers] == [x.block for x in pinned.measurement.layers]


def test_a_layer_limit_leaves_out_blocks_that_exceed_it():
    measurement = table(5, gain=0.01)
    only = replace(measurement, curves=measurement.curves.restrict(np.broadcast_to(BITS == 4, (9, 9))))
    found, _ = choose_blocks(only, np.isfinite(only.curves.distortion), Room(8 * 9 * 128, 4 * 3 * 128))
    assert [x.block for x in found.layers] == [0, 0, 0]
    with pytest.raises(BudgetError, match="cannot be met"):
        allocate_bits(table(5, blocks=(32, 64)), Budgets(weight_bits=0.1, activation_bits=None))


def test_widths_of_one_layer_are_one_unless_groups_pay():
    """A layer of 128 x 3 weights gains nothing like a million bits by groups."""
    budgets = Budgets(weight_bits=4, activation_bits=None, storage="nbits")
    found = allocate_bits(table(6), budgets)
    assert all(len(set(bits.tolist())) == 1 for bits in found.layer_bits)
    assert found.weight_average <= 4
    free = allocate_bits(table(6), Budgets(weight_bits=4, activation_bits=None))
    assert free.predicted < found.predicted
    assert found.bound <= free.predicted * (1 + 1e-9)
    again = allocate_bits(found.measurement, budgets, np.ones(9), found.bound)
    assert all(len(set(bits.tolist())) == 1 for bits in again.layer_bits)


def test_groups_without_a_price_are_taken(monkeypatch):
    monkeypatch.setattr("rdoq_onnx.allocation.block_sizes.GROUPED", 0.0)
    found = allocate_bits(table(6), Budgets(weight_bits=4, activation_bits=None, storage="nbits"))
    assert any(len(set(bits.tolist())) > 1 for bits in found.layer_bits)


def test_a_part_of_a_layer_may_be_pinned():
    budgets = Budgets(weight_bits=4, activation_bits=None, storage="nbits", pins=(("m0[0:1]", 8),))
    assert allocate_bits(table(7), budgets).layer_bits[0][0] == 8
