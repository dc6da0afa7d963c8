"""Layers on a systolic array in SCALE-Sim, at their widths. Needs `pip install 'rdoq-onnx[sim]'`, and no rdoq_onnx.

SCALE-Sim (Raj et al., ISPASS 2025; Samajdar et al., 2020) has words of one byte. A tensor of w bits enters by buffers
and bandwidth of 8/w as many words. Its multipliers stay as they are: a narrow layer computes no faster, it waits less.
What is on the chip needs no transfer: of a layer that fits, input and output have the bandwidth of the array.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scalesim.compute.operand_matrix import operand_matrix
from scalesim.compute.systolic_compute_ws import systolic_compute_ws
from scalesim.layout_utils import layouts
from scalesim.scale_config import scale_config
from scalesim.topology_utils import topologies
from scratchpads import Reads, Writes, run

ON_CHIP = 4096  # words a cycle, more than any array takes


@dataclass(frozen=True)
class Array:
    """rows, columns: of multipliers, with stationary weights. buffers: kB for inputs, weights and outputs.

    bandwidth: bytes a cycle from and to DRAM, for each of the three.
    """

    name: str
    rows: int
    columns: int
    buffers: tuple[int, int, int]
    bandwidth: int = 10

    @property
    def capacity(self) -> int:
        return 1024 * sum(self.buffers)


# configs/google.cfg and configs/eyeriss.cfg of github.com/scalesim-project/scale-sim-v2 (MIT), `Bandwidth : 10`.
TPU = Array("TPU", 256, 256, (6144, 6144, 2048))
EYERISS = Array("Eyeriss", 12, 14, (36, 36, 36))


@dataclass(frozen=True)
class Shape:
    """A convolution of one group, its input padded."""

    height: int
    width: int
    kernel: tuple[int, int]
    channels: int
    filters: int
    stride: int


@dataclass(frozen=True)
class Run:
    """Cycles with those of the first fetch, and bytes from and to DRAM at the tensors' widths."""

    cycles: float
    traffic: float


def simulate(array: Array, shape: Shape, groups: int, bits: tuple[float, float, float], fits: bool) -> Run:
    """Run a layer with inputs, weights and outputs of these bits; `groups` times one of its groups.

    fits: whether it is on the chip with its input and output, so that only weights come from DRAM.
    """
    rounded = tuple(max(round(2 * b) / 2, 0.5) for b in bits)  # so that layers share runs
    words = [int(array.bandwidth * 8 / b) for b in rounded]
    sizes = tuple(max(int(kB * 8 / b), 1) for kB, b in zip(array.buffers, rounded, strict=True))
    if fits:
        words[0] = words[2] = ON_CHIP
    cycles, moved = _layer(array, shape, sizes, tuple(words))
    counted = [0.0 if fits and k != 1 else moved[k] * bits[k] / 8 for k in range(3)]
    return Run(cycles * groups, sum(counted) * groups)


@dataclass(frozen=True, eq=False)
class Demand:
    """What the array asks for in each cycle, [cycles, ports], -1 for nothing; and the order in which it is fetched."""

    inputs: NDArray[np.int32]
    weights: NDArray[np.int32]
    outputs: NDArray[np.int64]  # how many, [cycles]
    input_order: NDArray[np.int32]
    weight_order: NDArray[np.int32]


@lru_cache(maxsize=1000)
def _layer(
    array: Array, shape: Shape, sizes: tuple[int, ...], words: tuple[int, ...]
) -> tuple[float, tuple[float, float, float]]:
    """Return cycles, and words that inputs, weights and outputs move."""
    demand = _demand(array, shape)
    inputs = Reads(demand.input_order, demand.inputs, 1024 * sizes[0], words[0])
    weights = Reads(demand.weight_order, demand.weights, 1024 * sizes[1], words[1])
    outputs = Writes(demand.outputs, 1024 * sizes[2], words[2])
    cycles = run((inputs, weights), outputs, len(demand.outputs))
    return float(cycles), (float(inputs.words), float(weights.words), float(outputs.words))


@lru_cache(maxsize=1)  # large: run all settings of a layer before the next
def _demand(array: Array, shape: Shape) -> Demand:
    """Have SCALE-Sim map a layer to the array."""
    config, topology = configured(array.rows, array.columns, shape, array.buffers, (array.bandwidth,) * 3)
    operands, compute = operand_matrix(), systolic_compute_ws()
    operands.set_params(config, topology, layouts(), 0)
    inputs, weights, outputs = (
        getattr(operands, f"get_{name}_matrix")()[1].astype(np.int32) for name in ("ifmap", "filter", "ofmap")
    )
    compute.set_params(config_obj=config, ifmap_op_mat=inputs, filter_op_mat=weights, ofmap_op_mat=outputs)
    compute.create_demand_matrices()
    compute.create_filter_prefetch_mat()
    return Demand(
        compute.ifmap_demand_matrix.astype(np.int32),
        compute.filter_demand_matrix.astype(np.int32),
        (compute.ofmap_demand_matrix != -1).sum(axis=1),
        _input_order(inputs, array.rows),
        compute.filter_prefetch_matrix.astype(np.int32).ravel(),
    )


def _input_order(operand: NDArray[np.int32], rows: int) -> NDArray[np.int32]:
    """Fold to the array's rows and read along diagonals upwards, as `create_ifmap_prefetch_mat` does in a loop."""
    padded = np.pad(operand, ((0, 0), (0, -operand.shape[1] % rows)), constant_values=-1)
    folded = np.concatenate(np.split(padded, padded.shape[1] // rows, axis=1))[::-1]
    diagonals = np.arange(len(folded))[::-1, None] + np.arange(rows)
    return folded.ravel()[np.argsort(diagonals, axis=None, kind="stable")]


def configured(
    rows: int, columns: int, shape: Shape, sizes: tuple[int, ...], words: tuple[int, ...]
) -> tuple[Any, Any]:
    """Return SCALE-Sim's configuration and topology of one layer. sizes: kB of buffers. words: a cycle."""
    config = scale_config()
    config.update_from_list(["run", rows, columns, *sizes, 0, 10_000_000, 20_000_000, "ws", "USER", [words[2]]])
    config.ifmap_sram_bank_bandwidth, config.filter_sram_bank_bandwidth = words[0], words[1]
    config.ifmap_sram_bank_num = config.filter_sram_bank_num = 1
    topology = topologies()
    entry = (shape.height, shape.width, *shape.kernel, shape.channels, shape.filters, shape.stride, shape.stride, 1, 1)
    topology.load_layer_params_from_list("layer", ["layer", *entry])
    return config, topology
