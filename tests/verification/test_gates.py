"""Gates: the worst part decides, and only what the samples prove counts."""

import numpy as np
import onnx
import pytest

from rdoq_onnx.emission.emit import Emission
from rdoq_onnx.observation.part_values import PartPowers
from rdoq_onnx.observation.parts import Part, Piece
from rdoq_onnx.verification.gates import missed_gate
from rdoq_onnx.verification.part_figures import part_figures
from rdoq_onnx.verification.verify import Verification

PIECE = Piece("y", "y", "y", "whole")
EMISSION = Emission(onnx.ModelProto(producer_name="some bytes"), "packed", {}, {})


def verification(*sqnr, count=40, spread=0.2):
    """Parts with these decibels, on samples whose noise differs by `spread`."""
    rng = np.random.default_rng(0)
    noise = np.stack([10 ** (-db / 10) * (1 + spread * rng.standard_normal(count)) for db in sqnr], axis=1)
    powers = PartPowers(np.ones(noise.shape), noise)
    parts = part_figures([Part(f"part{k}", (PIECE,)) for k in range(len(sqnr))], powers)
    return Verification(parts, (0.1,) * len(sqnr), 0.0, {}, {}, count, powers=powers)


def missed(found, min_sqnr=None, max_bytes=None):
    return missed_gate(EMISSION, found, min_sqnr, max_bytes)


def test_a_gate_goes_by_the_worst_part():
    assert missed(verification(30, 50), 29) is None
    error = missed(verification(30, 50), 40)
    assert error.exit_code == 4
    assert str(error).startswith("--min-sqnr 40: the emitted model has 30.")
    assert "in part 'part0'; give more bits" in str(error)
    assert "part" not in str(missed(verification(30), 40))


def test_a_figure_that_its_samples_do_not_prove_does_not_pass():
    found = verification(30, count=4, spread=0.5)
    least = (found.sqnr_db + found.worst.bound_db) / 2
    assert "4 samples of" in str(missed(found, least))
    assert "with --validation, or more bits" in str(missed(found, least))
    assert missed(found, found.worst.bound_db - 0.1) is None
    one = verification(30, count=1)
    assert "prove nothing; give more samples" in str(missed(one, 1))


def test_no_noise_at_all_passes_any_gate():
    powers = PartPowers(np.ones((4, 1)), np.zeros((4, 1)))
    parts = part_figures([Part("y", (PIECE,))], powers)
    assert (parts[0].sqnr_db, parts[0].bound_db) == (np.inf, np.inf)
    assert missed(Verification(parts, (0.0,), 0.0, {}, {}, 4, powers=powers), 200) is None


def test_max_bytes():
    size = EMISSION.model.ByteSize()
    assert missed(verification(30), None, size) is None
    message = f"--max-bytes {size - 1}: the emitted model has {size} bytes; give fewer bits"
    assert str(missed(verification(30), None, size - 1)) == message


@pytest.mark.parametrize("count", [3, 30])
def test_the_number_of_samples_that_would_do_is_near(count):
    found = verification(30, count=count, spread=0.5)
    least = found.sqnr_db - 0.5 * (found.sqnr_db - found.worst.bound_db)
    needed = int(str(missed(found, least)).split("about ")[1].split(" ")[0])
    assert count < needed < 8 * count
