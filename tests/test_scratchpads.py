"""The memories of bench_hardware.py serve the same lines in the same cycles, with the same traffic, as SCALE-Sim's."""

import sys
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import pytest

from tests.conftest import ROOT


@dataclass(frozen=True)
class Case:
    """Words of the three buffers and words a cycle, and what SCALE-Sim 3.0.0 gave: cycles, and words moved."""

    sizes: tuple[int, int, int]
    bandwidth: tuple[int, int, int]
    cycles: int
    words: tuple[int, int, int]


CASES = (
    Case((2048, 2048, 2048), (10, 10, 10), 418, (600, 130, 1200)),
    Case((256, 128, 128), (10, 10, 10), 868, (7930, 140, 1200)),
    Case((256, 2048, 64), (100, 3, 1), 1198, (12200, 129, 1200)),
    Case((300, 64, 200), (7, 64, 13), 882, (5698, 256, 1200)),
)


def requests():
    """Windows of 9 that slide over 600 addresses in two folds, the weights of each fold, and up to 5 outputs a line."""
    inputs = 2 * np.arange(150)[:, None] + np.arange(9)
    inputs = np.concatenate([inputs, inputs + 290])
    weights = np.full((300, 4), -1)
    weights[:12] = np.arange(48).reshape(12, 4) + 5000
    weights[150:170] = np.arange(80).reshape(20, 4) + 5048
    outputs = np.arange(1500).reshape(300, 5) + 9000
    outputs[::3, 2:] = -1
    return inputs, weights, outputs, np.arange(600), np.arange(5000, 5128)


@pytest.fixture(scope="module")
def scratchpads():
    """The module, as the script finds it, in its own folder."""
    folder = str(ROOT / "tests" / "benchmarks")
    sys.path.append(folder)
    yield import_module("scratchpads")
    sys.path.remove(folder)


def ours(scratchpads, case):
    inputs, weights, outputs, input_order, weight_order = requests()
    reads = (
        scratchpads.Reads(input_order, inputs, case.sizes[0], case.bandwidth[0]),
        scratchpads.Reads(weight_order, weights, case.sizes[1], case.bandwidth[1]),
    )
    writes = scratchpads.Writes((outputs != -1).sum(axis=1), case.sizes[2], case.bandwidth[2])
    cycles = scratchpads.run(reads, writes, len(outputs))
    return cycles, (reads[0].words, reads[1].words, writes.words)


@pytest.mark.parametrize("case", CASES)
def test_figures_of_scale_sim(scratchpads, case):
    assert ours(scratchpads, case) == (case.cycles, case.words)


@pytest.mark.parametrize("lines", [1, 7, 64])
def test_lines_looked_at_together_change_nothing(scratchpads, monkeypatch, lines):
    monkeypatch.setattr(scratchpads, "LINES", lines)
    assert [ours(scratchpads, case) for case in CASES] == [(case.cycles, case.words) for case in CASES]


@pytest.mark.parametrize("case", CASES)
def test_beside_scale_sim_itself(scratchpads, case):
    """Where it is installed."""
    memories = pytest.importorskip("scalesim.memory.double_buffered_scratchpad_mem", reason="needs the extra [sim]")
    config = import_module("scalesim.scale_config").scale_config()
    inputs, weights, outputs, input_order, weight_order = requests()
    names = ("ifmap", "filter", "ofmap")
    memory = memories.double_buffered_scratchpad()
    memory.set_params(
        verbose=False,
        config=config,
        **{f"{name}_buf_size_bytes": size for name, size in zip(names, case.sizes, strict=True)},
        **{f"{name}_backing_buf_bw": words for name, words in zip(names, case.bandwidth, strict=True)},
    )
    memory.set_read_buf_prefetch_matrices(input_order[None], weight_order[None])
    memory.service_memory_requests(inputs, weights, outputs)
    details = [getattr(memory, f"get_{name}_dram_details")() for name in names]
    cycles = int(details[2][1] - min(details[0][0], details[1][0]))
    assert ours(scratchpads, case) == (cycles, tuple(int(moved) for *_, moved in details))
