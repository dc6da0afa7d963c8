"""The on-chip limit with activations: weights, input and output of every layer fit at their widths."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.config import Budgets, Config
from rdoq_onnx.errors import BudgetError, ConfigError
from tests.allocation.test_budget import weight_rate
from tests.allocation.test_costed import measurement


def held(allocation):
    """Bits on the chip for each layer: the middle one's output is an extra 8-bit tensor, the last one's is in float."""
    x, a1, _, r = allocation.activation_bits
    weights = [int(bits.sum()) * k for bits, k in zip(allocation.layer_bits, (3, 4, 4), strict=True)]
    ends = [48 * x + 64 * a1, 64 * a1 + 64 * 8, 64 * r + 80 * 32]
    return [w + e for w, e in zip(weights, ends, strict=True)]


@settings(max_examples=40)
@given(st.integers(0, 99), st.integers(340, 480))
def test_everything_fits(seed, limit):
    budgets = Budgets(weight_bits=6, activation_bits=7, layer_limit=limit, layer_limit_activations=True)
    allocation = allocate_bits(measurement(seed), budgets)
    assert max(held(allocation)) <= 8 * limit
    assert weight_rate(allocation) <= 6 * 48


def test_what_one_layer_gives_up_goes_to_others():
    plain = Budgets(weight_bits=5, activation_bits=6)
    free = allocate_bits(measurement(3), plain)
    limit = (max(held(free)) - 30) // 8
    found = allocate_bits(measurement(3), replace(plain, layer_limit=limit, layer_limit_activations=True))
    assert max(held(found)) <= 8 * limit
    assert found.predicted >= free.predicted
    assert found.bound == pytest.approx(free.bound)


def test_an_ample_limit_changes_nothing():
    budgets = Budgets(weight_bits=5, activation_bits=6)
    ample = replace(budgets, layer_limit=10**6, layer_limit_activations=True)
    free, found = (allocate_bits(measurement(1), each) for each in (budgets, ample))
    assert free.bits.tolist() == found.bits.tolist()


def test_a_limit_out_of_reach_names_the_layer_and_its_need():
    # third: 0 bits of weights, 64 elements at 1 bit, 80 of its output in float
    with pytest.raises(BudgetError, match=r"--layer-limit 300 cannot be met: .* layer 'third' take 328 bytes"):
        allocate_bits(measurement(), Budgets(weight_bits=5, layer_limit=300, layer_limit_activations=True))


def test_it_needs_a_limit():
    with pytest.raises(ConfigError, match="--layer-limit-activations says what --layer-limit counts"):
        Config(layer_limit_activations=True)
