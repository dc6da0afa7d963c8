"""Layers on a systolic array in SCALE-Sim, at their widths. Needs `pip install 'rdoq-onnx[sim]'`, and no rdoq_onnx.

SCALE-Sim (Raj et al., ISPASS 2025; Samajdar et al., 2020) has words of one byte. A tensor of w bits enters by buffers
and bandwidth of 8/w as many words. Its multipliers stay as they are: a narrow layer computes no faster, it waits less.
What is on the chip needs no transfer: of a layer that fits, input and output have the bandwidth of the array.
"""

import contextlib
import io
from dataclasses import dataclass
from functools import cache

from scalesim.layout_utils import layouts
from scalesim.scale_config import scale_config
from scalesim.single_layer_sim import single_layer_sim
from scalesim.topology_utils import topologies

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
    cycles, reads = _layer(array.rows, array.columns, shape, sizes, tuple(words))
    counted = [0.0 if fits and k != 1 else reads[k] * bits[k] / 8 for k in range(3)]
    return Run(cycles * groups, sum(counted) * groups)


@cache
def _layer(
    rows: int, columns: int, shape: Shape, sizes: tuple[int, ...], words: tuple[int, ...]
) -> tuple[float, tuple[float, float, float]]:
    """Return cycles, and words that inputs, weights and outputs move."""
    config = scale_config()
    config.update_from_list(["run", rows, columns, *sizes, 0, 10_000_000, 20_000_000, "ws", "USER", [words[2]]])
    config.ifmap_sram_bank_bandwidth, config.filter_sram_bank_bandwidth = words[0], words[1]
    config.ifmap_sram_bank_num = config.filter_sram_bank_num = 1
    topology = topologies()
    entry = (shape.height, shape.width, *shape.kernel, shape.channels, shape.filters, shape.stride, shape.stride, 1, 1)
    topology.load_layer_params_from_list("layer", ["layer", *entry])
    layer = single_layer_sim()
    layer.set_params(0, config, topology, layouts(), False)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        layer.run()
        layer.calc_report_data()
    detail = layer.get_detail_report_items()
    return float(layer.get_compute_report_items()[0]), (float(detail[11]), float(detail[14]), float(detail[17]))
