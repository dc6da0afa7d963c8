"""Allocation within budgets and pins: the average never exceeds a budget, and errors name the option."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper, parser

from rdoq_onnx.allocation.budget import allocate_bits, uniform_bits
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.config import MAX_BITS, Budgets, Config
from rdoq_onnx.curves.curves import Curves
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.errors import BudgetError

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[1, 3, 4, 4] x) => (float[1, 5, 4, 4] y)
{ [first] z1 = Conv (x, w1) [act] a1 = Relu (z1) [second] z2 = Conv (a1, w2)
  [add] r = Add (z2, a1) [third] y = Conv (r, w3) }"""
SHAPES = {"w1": (4, 3, 1, 1), "w2": (4, 4, 1, 1), "w3": (5, 4, 1, 1)}
CHANNELS = 13
ACTIVATIONS = ("x", "a1", "z2", "r")  # z2 is a fusion tensor


def measurement(seed=0, widths=tuple(range(8)), **settings):
    """Make curves that fall by about 6 dB per bit, of random height; no model is run."""
    model = parser.parse_model(TEXT)
    model.graph.initializer.extend(numpy_helper.from_array(np.ones(s, np.float32), k) for k, s in SHAPES.items())
    network = analyse(model, replace(Config(**settings).selection, narrow=False))
    rng = np.random.default_rng(seed)
    activations = len(network.activations)
    elements = np.array([3] * 4 + [4] * 4 + [4] * 5 + [48, 64, 64, 64][:activations])
    bits = np.arange(MAX_BITS + 1)
    distortion = rng.lognormal(0, 2, (len(elements), 1)) * 4.0**-bits * rng.uniform(0.7, 1.3, (len(elements), 9))
    allowed = np.zeros(distortion.shape, bool)
    allowed[:CHANNELS, list(widths)] = True
    allowed[CHANNELS:, 1:] = True
    if activations:
        allowed[CHANNELS + 2] = bits == 8
    curves = Curves(bits, elements, np.where(allowed, distortion, np.inf))
    unused = {f.name: None for f in fields(Measurement)}
    return Measurement(**unused | {"network": network, "curves": curves, "layers": ()})


def weight_rate(allocation):
    return sum(int(b.sum()) * k for b, k in zip(allocation.layer_bits, (3, 4, 4), strict=True))


def test_activations_of_the_test_model():
    assert tuple(a.tensor for a in measurement().network.activations) == ACTIVATIONS
    assert [a.fusion for a in measurement().network.activations] == [False, False, True, False]


BITS = st.floats(0, 8)


@given(st.integers(0, 99), BITS, st.floats(1, 8))
def test_never_over_either_budget(seed, weight_bits, activation_bits):
    budgets = Budgets(weight_bits=weight_bits, activation_bits=activation_bits)
    allocation = allocate_bits(measurement(seed), budgets)
    assert [len(b) for b in allocation.layer_bits] == [4, 4, 5]
    assert weight_rate(allocation) <= weight_bits * 48 + 1e-5
    x, a1, z2, r = allocation.activation_bits
    assert 48 * x + 64 * a1 + 64 * r <= activation_bits * 176 + 1e-5
    assert z2 == 8
    assert allocation.weight_average == pytest.approx(weight_rate(allocation) / 48)
    assert allocation.activation_average == pytest.approx((48 * x + 64 * a1 + 64 * r) / 176)
    assert 0 <= allocation.gap <= 1


@given(st.integers(0, 99), st.floats(1, 8))
def test_joint_budget(seed, bits):
    table = measurement(seed)
    joint = allocate_bits(table, Budgets(weight_bits=bits, activation_bits=bits, joint=True))
    x, a1, z2, r = joint.activation_bits
    assert weight_rate(joint) + 48 * x + 64 * a1 + 64 * r <= bits * (48 + 176) + 1e-5
    assert z2 == 8


def test_joint_budget_moves_bits_between_weights_and_activations():
    table = measurement(3)
    scaled = table.curves.distortion.copy()
    scaled[:CHANNELS] *= 1e6
    table = replace(table, curves=Curves(table.curves.widths, table.curves.elements, scaled))
    joint, apart = (allocate_bits(table, Budgets(weight_bits=3, activation_bits=3, joint=j)) for j in (True, False))
    assert joint.weight_average > 6
    assert joint.activation_average < 3
    assert apart.weight_average <= 3
    assert joint.predicted < apart.predicted


def test_predicted_is_the_sum_over_the_curves():
    table = measurement(5)
    allocation = allocate_bits(table, Budgets(weight_bits=3, activation_bits=4))
    choice = np.concatenate([*allocation.layer_bits, allocation.activation_bits])
    expected = table.curves.distortion[np.arange(len(choice)), choice].sum()
    assert allocation.predicted == pytest.approx(expected)
    # By exchange: no two channels can swap a bit for less distortion and no more rate.
    assert allocation.gap < 0.2


def test_more_budget_never_predicts_more_distortion():
    table = measurement(6)
    found = [allocate_bits(table, Budgets(weight_bits=b, activation_bits=4)).predicted for b in np.arange(0, 8, 0.25)]
    assert (np.diff(found) <= 0).all()
    assert found[-1] < found[0]


@given(st.integers(0, 99), st.floats(1, 8), st.booleans())
def test_a_given_bound_is_not_solved_for_again(seed, bits, joint):
    measured = measurement(seed)
    budgets = Budgets(weight_bits=bits, activation_bits=bits, joint=joint)
    plain = allocate_bits(measured, budgets)
    assert plain.bound <= plain.predicted
    weigh = np.random.default_rng(seed).uniform(0.5, 2, len(measured.curves.elements))
    solved, reused = (allocate_bits(measured, budgets, weigh, bound) for bound in (None, plain.bound))
    assert reused.bits.tolist() == solved.bits.tolist()
    assert reused.gap == pytest.approx(solved.gap, abs=1e-9)


@pytest.mark.parametrize("weigh", [None, 2.0])
def test_the_gap_is_that_of_the_same_budget_in_bytes(weigh):
    measured = measurement(3, widths=tuple(range(2, 8)))  # so that the minimum size is not 0
    rows = None if weigh is None else np.where(np.arange(len(measured.curves.elements)) < 4, weigh, 1.0)
    in_bits = allocate_bits(measured, Budgets(weight_bits=3), rows)
    in_bytes = allocate_bits(measured, Budgets(size=18), rows)  # 48 weights
    assert in_bytes.bits.tolist() == in_bits.bits.tolist()
    assert in_bytes.gap == pytest.approx(in_bits.gap)
    assert in_bits.gap > 0


def test_weights_alone():
    table = measurement(1, activation_bits=None)
    allocation = allocate_bits(table, Budgets(weight_bits=2.5, activation_bits=None))
    assert allocation.activation_bits == ()
    assert allocation.activation_average is None
    assert allocation.weight_average <= 2.5
    assert allocation.weight_average > 2.4


OVER = {
    "--weight-bits": {"weight_bits": 1.0, "pins": (("third", 7),)},
    "--activation-bits": {"activation_bits": 2.0, "pins": (("a1", 8),)},
    "--bits": {"weight_bits": 1.0, "activation_bits": 1.0, "joint": True, "pins": (("a1", 8),)},
}


@pytest.mark.parametrize("option", OVER)
def test_budget_that_cannot_be_met(option):
    message = rf"^{option} [12] cannot be met: .*the narrowest allowed widths take"
    with pytest.raises(BudgetError, match=message) as error:
        allocate_bits(measurement(0), Budgets(**OVER[option]))
    assert error.value.exit_code == 3
    assert "\n" not in str(error.value)


def test_widths_that_are_over_the_budget():
    with pytest.raises(BudgetError, match="--weight-bits 3"):
        allocate_bits(measurement(0, widths=(4, 6)), Budgets(weight_bits=3, activation_bits=8))
    allocation = allocate_bits(measurement(0, widths=(4, 6)), Budgets(weight_bits=4, activation_bits=8))
    assert {int(b) for several in allocation.layer_bits for b in several} == {4}


@pytest.mark.parametrize(("side", "uniform"), [("weights", [True, False]), ("activations", [False, True])])
def test_uniform_widths_on_one_side(side, uniform):
    measured = measurement()
    found = uniform_bits(measured, Budgets(weight_bits=3.5, activation_bits=5.5), side)
    widths = np.concatenate(found.layer_bits), np.array(found.activation_bits)[[0, 1, 3]]
    assert [len(set(w.tolist())) == 1 for w in widths] == uniform


def layer_bytes(allocation):
    return [b.sum() * k / 8 for b, k in zip(allocation.layer_bits, (3, 4, 4), strict=True)]


@given(st.integers(0, 50), st.integers(1, 10), st.booleans())
def test_no_layer_is_over_its_limit(seed, limit, joint):
    budgets = Budgets(weight_bits=4, activation_bits=4, joint=joint)
    measured = measurement(seed)
    free, found = (allocate_bits(measured, replace(budgets, layer_limit=x)) for x in (None, limit))
    assert max(layer_bytes(found)) <= limit
    assert found.predicted >= free.predicted * (1 - free.gap) - 1e-12
    if max(layer_bytes(free)) <= limit:
        assert found.predicted == free.predicted
    uniform = uniform_bits(measured, replace(budgets, layer_limit=limit))
    assert uniform is None or max(layer_bytes(uniform)) <= limit


def test_bits_that_a_limited_layer_gives_up_go_to_the_others():
    measured = measurement(3)
    free = allocate_bits(measured, Budgets(weight_bits=4))
    limit = int(max(layer_bytes(free))) - 1
    found = allocate_bits(measured, Budgets(weight_bits=4, layer_limit=limit))
    assert weight_rate(found) > weight_rate(free) - 8


def test_layer_limit_that_cannot_be_met():
    budgets = Budgets(weight_bits=6, layer_limit=5)
    with pytest.raises(BudgetError, match=r"--layer-limit 5 cannot be met: .* layer 'first' take 6 bytes; give"):
        allocate_bits(measurement(widths=(4, 6)), budgets)


@given(st.integers(1, 42))
def test_size_is_a_budget_in_bytes(size):
    found = allocate_bits(measurement(), Budgets(size=size))
    assert 8 * size - 32 < weight_rate(found) <= 8 * size or weight_rate(found) == 7 * 48
    uniform = uniform_bits(measurement(), Budgets(size=size))
    assert weight_rate(uniform) <= 8 * size


def test_size_that_cannot_be_met():
    with pytest.raises(BudgetError, match="--size 9 cannot be met: the narrowest allowed widths take 24 bytes; give"):
        allocate_bits(measurement(widths=(4, 6)), Budgets(size=9))
