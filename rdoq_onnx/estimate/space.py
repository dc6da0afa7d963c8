"""Estimate the peak of memory and the scratch space of a run, from the sizes of what it holds at the same time."""

from dataclasses import dataclass

from rdoq_onnx.calibration.blocks import MOST_BLOCKS
from rdoq_onnx.candidates.moment_passes import first_of_input, portions, second_bytes
from rdoq_onnx.config import Config
from rdoq_onnx.curves import anchoring, float_fallback
from rdoq_onnx.curves.forms import form_portions, marginal
from rdoq_onnx.curves.large import is_large, memory_for_sums
from rdoq_onnx.estimate.work import Work
from rdoq_onnx.model.external import HUGE, is_detached
from rdoq_onnx.probing.prefix import CACHE_BYTES
from rdoq_onnx.report.wording import about_bytes
from rdoq_onnx.system.memory import machine_memory
from rdoq_onnx.system.scratch import PARKED, Scratch
from rdoq_onnx.system.threads import cores

BASE = 150 << 20  # bytes of the process with what it imports
_CANDIDATE = 47  # bytes of a weight in one rounding variant at all widths, and its changes
_COPIES = 3  # of an unfolded input, while its sum is made
_ALIVE = 0.5  # share of all tensors of a pass that are needed at the same time
_STATE = 28  # bytes of the state of a channel at one width, and of its scale
_SLACK = 1.1  # what allocators leave unused
_CLEARLY = 1.2  # an estimate of so many times what there is is worth a word


@dataclass(frozen=True)
class Space:
    """Bytes at the peak, in memory and in the scratch folder."""

    memory: int
    scratch: int


def space(work: Work, shelf: int) -> Space:
    """Estimate the space of a run. shelf: bytes of large weights that are in the scratch folder already."""
    large, detached = is_large(work.network, work.config), is_detached(work.network.model)
    weights = work.model * (2 if not detached or work.model <= HUGE else 1)
    held = 0 if detached else work.model * 3  # the model, normalized and in the form that is being edited
    candidates = 0 if large else _CANDIDATE * sum(x.variants * x.weights for x in work.layers)
    sums = _large(work) if large else candidates
    steps = [_forward(work), _backward(work) + sums, candidates + _exact(work)]
    return Space(int(BASE + _SLACK * (held + weights + max(steps))), shelf + (_kept(work) if large else 0))


def _threads(work: Work) -> int:
    return min(work.config.threads or cores(), max(len(work.layers), 1))


def _forward(work: Work) -> int:
    """Bytes of the tensors of one batch, of those that finding the batch runs, and of the sums over them."""
    size = min(work.observation.batching.size, max(int(work.seen), 1))
    each = int(4 * work.tensors * work.observation.batching.peak)
    unfolded = sorted((x.unfolded for x in work.layers), reverse=True)[: _threads(work)]
    return max(5 * each, 2 * size * each, size * (each + 4 * _COPIES * sum(unfolded)))


def _backward(work: Work) -> int:
    """Bytes of one batch of tensors and adjoints, and of the sums over them."""
    size, each = work.backward_batch(), int(4 * work.tensors * work.observation.batching.peak)
    unfolded = sorted((x.unfolded for x in work.layers), reverse=True)[: _threads(work)]
    centred = (_COPIES - 1) * min(size, max(int(work.measuring), 1))
    inner = int(4 * _ALIVE * work.inner)
    return size * (each * (1 + work.rows) + inner) + 4 * (size + centred) * sum(unfolded)


def _large(work: Work) -> int:
    """Bytes of the sums of one pass over a large network, with the statistics that are mapped meanwhile."""
    layers, memory = work.network.layers, memory_for_sums(work.network, work.config.memory)
    first = first_of_input(layers)
    shared = max(sum(map(second_bytes, {first[x.name] for x in p})) for p in portions(layers, memory))
    alone = max(sum(map(second_bytes, p)) for p in portions(layers, 2 * memory, shared=False))
    seconds = max(shared, alone // 2)  # F is summed in single precision
    passes = form_portions(work.network, memory)
    powers = (
        0 if marginal(work.network) else 4 * max(sum(x.weights for x in work.layers if x.layer in p) for p in passes)
    )
    mapped = 4 * sum(x.second for x in work.layers)
    gradients = sorted((x.weights for x in work.layers), reverse=True)[: _threads(work)]
    waiting = MOST_BLOCKS.bit_length() * min(max(seconds, powers), PARKED)  # nodes of the tree of a sum
    return max(seconds, powers + mapped) + waiting + 3 * 4 * sum(gradients)


def _exact(work: Work) -> int:
    """Bytes of the tensors that exact measurements keep, if there are any, and of the pass that makes them."""
    anchored = anchoring.SAMPLES[1] if anchoring.WORK[work.config.effort] else 0
    samples = float_fallback.SAMPLES[1] if work.network.activations else anchored
    batch = min(work.observation.batching.size, samples, max(int(work.judging), 1))
    kept = min(CACHE_BYTES, int(4 * _ALIVE * work.inner * min(work.judging, samples)))
    return kept + 4 * batch * work.tensors


def _kept(work: Work) -> int:
    """Bytes of statistics, codes and states of a large network, and of its equalized weights."""
    seconds = 4 * (sum(x.second for x in work.inputs) + 2 * sum(x.second for x in work.layers))
    powers = 0 if marginal(work.network) else 4 * work.weights
    searched = (*work.layers, *work.stored)
    states = sum(_STATE * x.blocks * x.channels * len(work.widths) for x in searched)
    # Codes are made of the first block size, and of the one that is chosen.
    codes = len(work.widths) * sum(min(x.blocks, 2) * x.weights for x in searched)
    equalized = 4 * work.weights if work.network.activations else 0
    return seconds + powers + codes + states + equalized


def shortages(space: Space, config: Config, scratch: Scratch) -> tuple[str, ...]:
    """Word what a run probably lacks: memory within --memory or the machine's, or room for its scratch folder."""
    found = []
    limit = config.memory or machine_memory()
    if space.memory > _CLEARLY * limit:
        owner = "--memory allows" if config.memory else "this machine has"
        found.append(f"the run may take {about_bytes(space.memory)} of memory, but {owner} {about_bytes(limit)}")
    free, where = scratch.free()
    if space.scratch > _CLEARLY * free:
        needs = f"the run may take {about_bytes(space.scratch)} of scratch space"
        found.append(f"{needs}, but {where} has {about_bytes(free)} free; give --scratch a larger folder")
    return tuple(found)
