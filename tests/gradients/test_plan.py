"""Number of vectors v per sample: all unit vectors for few outputs, enough random ones for few samples."""

import pytest

from rdoq_onnx.gradients.plan import EXACT_ROWS, LEAST_DRAWS, draws, rounds, rows_of


def test_few_outputs_get_a_unit_vector_each():
    assert [rows_of(n) for n in (1, EXACT_ROWS, EXACT_ROWS + 1)] == [1, EXACT_ROWS, 1]
    assert draws(5, EXACT_ROWS) == 5 * EXACT_ROWS


@pytest.mark.parametrize("samples", [1, 3, LEAST_DRAWS - 1, LEAST_DRAWS, 1000])
def test_few_samples_are_repeated_until_draws_suffice(samples):
    assert draws(samples, 1000) == samples * rounds(samples) >= LEAST_DRAWS
    assert (rounds(samples) - 1) * samples < LEAST_DRAWS
