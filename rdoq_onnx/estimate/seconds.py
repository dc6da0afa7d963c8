"""Estimate the seconds of each step of a run: how often it does what, times how long that takes here.

Most of a small network's time are passes and sums over samples; a large network's layers (curves/large.py) are rounded
one by one, which takes longest. What data decide (how many trials gain, what first order misjudges) is a typical value.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from rdoq_onnx.candidates.moment_passes import passes, portions
from rdoq_onnx.curves import anchoring, divergence, float_fallback
from rdoq_onnx.curves.forms import form_portions, marginal
from rdoq_onnx.curves.large import REACH, is_large, memory_for_sums
from rdoq_onnx.curves.measure import EQUALIZING
from rdoq_onnx.curves.steps import CLIPPING, SENSING
from rdoq_onnx.estimate.speeds import WIDTH, Speeds
from rdoq_onnx.estimate.work import VARIANTS, LayerWork, Work
from rdoq_onnx.model.external import is_huge
from rdoq_onnx.reconstruction.work import default_steps, step_batch
from rdoq_onnx.refinement.joint_tuning import TUNING
from rdoq_onnx.refinement.judge import JUDGING
from rdoq_onnx.refinement.plan import EFFORTS
from rdoq_onnx.verification.predicted_parts import DRAWS

REVERSE = 3.3  # a forward and reverse pass, in forward passes
VERIFY = 7.0  # runs of each held-out sample: two levels, with all threads and with one
_FETCH = 1.5  # a pass that also fetches and reduces all tensors, in passes
_TOUCHED = 4.0  # copies of an unfolded input that a sum over it takes
_BINNED = 4.0  # copies of an activation that all its quantizers take
_NODE = 5e-4  # seconds to edit, infer and load a node of a graph
_LAYER = 2e-2  # seconds of rounding a layer, however small
_COLUMNS = 2000  # inputs whose products take as long as the rest of rounding a weight with compensation
_DOUBTFUL = 0.05  # share of activations that are measured exactly
_CLIPS = 8  # quantizers that are tried for an activation's width
_AGAIN = 1.2  # compensation in the rounds of allocation after the first, on top of it
_SEARCHED = 0.25  # share of the trials of a search that stops early
_EMITTED = 2.0  # loading the emitted model, which decodes its weights, in times of the float one
_WRITTEN = 1e-8  # seconds to make a byte of the emitted model
_LATENCY = 0.8  # seconds of timing both models
_TUNED = 10.0  # a step of tuning, in float passes of its samples
_UPDATED = 3e-8  # seconds of a step for a weight
_WITH_TRIALS = 1.1  # steps of tuning with those of its trials
_PROBED = 2  # exact measurements run half the network


@dataclass(frozen=True)
class Estimate:
    """The seconds of the steps of `work`. begin: those that reading it took."""

    work: Work
    speeds: Speeds
    begin: float = 0.0

    def steps(self) -> dict[str, float]:
        """Return the seconds of each step by its name in the report."""
        work, one, load = self.work, self.speeds.forward, self.speeds.load
        ends = {
            "normalize": self.begin,
            "observe": 2 * load + (work.seen + 5) * _FETCH * one,
            "verify": 6 * _EMITTED * load + work.held_out * VERIFY * one + self._parts(),
            "emit": self._graph + _WRITTEN * work.model,
            "latency": _LATENCY + (1 + _EMITTED) * load + 4 * one,
        }
        tables = {"tables": self._tables()} if work.stored else {}
        if not work.layers:
            return ends | tables
        activations = self._activations() if work.network.activations else {}
        if work.config.measure == "probe":
            left_out = ("clipping", "taylor", "taylor, activations", "doubtful")
            steps = self._small() | activations | {"probe": self._probe()}
            measured = {name: seconds for name, seconds in steps.items() if name not in left_out}
        else:
            large = is_large(work.network, work.config)
            measured = (self._large() if large else self._small()) | activations | self._anchoring()
        others = ends | tables | measured | {"second look": self._refinement(measured)}
        return others | self._tuning(sum(others.values()))

    @property
    def _graph(self) -> float:
        return _NODE * len(self.work.network.model.graph.node)

    def _reverse(self, samples: float, runs: float, rows: int) -> float:
        """Return the seconds of a reverse graph, built, and run `runs` times for `samples` samples with `rows` v."""
        ran = self.work.filled(samples, runs)
        return 2 * self.speeds.load + 3 * self._graph + ran * rows * REVERSE * self.speeds.forward

    def _moments(self, count: int, samples: float) -> float:
        """Return the seconds of the moments in `count` passes over `samples`."""
        speeds, inputs = self.speeds, self.work.inputs
        touched = _TOUCHED * speeds.element * sum(x.unfolded for x in inputs)
        sums = touched + speeds.product * sum(x.second * x.positions for x in inputs)
        return count * (speeds.load + self._graph) + samples * (count * _FETCH * speeds.forward + sums)

    def _sensing(self, count: int) -> float:
        """Return the seconds of the sensitivities in `count` passes."""
        work, speeds = self.work, self.speeds
        touched = _TOUCHED * speeds.element * sum(x.unfolded for x in work.layers)
        sums = touched + speeds.product * sum(x.sensing for x in work.layers)
        return count * self._reverse(min(SENSING, work.fitting), work.sensing, 1) + work.sensing * sums

    def _tables(self) -> float:
        """Return the seconds of the rows of tables; of a small network, of their rounding, too."""
        work = self.work
        looked_up = any(x.layer.looked_up for x in work.stored)
        seconds = self._reverse(work.seen, work.runs(work.seen), 1) if looked_up else 0.0
        if is_large(work.network, work.config):
            return seconds
        return seconds + sum(self._nearest(x) + self._compensated(x, work.widths, x.variants) for x in work.stored)

    def _small(self) -> dict[str, float]:
        work, speeds = self.work, self.speeds
        runs, widths = work.runs(work.measuring), len(work.widths)
        touched = _TOUCHED * speeds.element * sum(x.unfolded for x in work.layers)
        products = speeds.product * work.rows * sum(x.forward + x.weights * x.variants * widths for x in work.layers)
        rounding = sum(self._nearest(x) + self._compensated(x, work.widths, x.variants) for x in work.layers)
        return {
            "moments": self._moments(passes(work.network), work.fitting + work.compared),
            "sensitivity": self._sensing(1),
            "candidates": rounding + _LAYER * len(work.layers) / speeds.threads,
            "taylor": self._reverse(work.measuring, runs, work.rows) + runs * (touched + products),
            **self._divergence(touched),
        }

    def _divergence(self, touched: float) -> dict[str, float]:
        """Return the seconds of the curves of the divergence; touched: those of the unfolded inputs of a sample."""
        work = self.work
        if divergence.second_metric(work.observation.metric, work.config) is None:
            return {}
        products = self.speeds.product * work.rows * sum(x.forward + x.weights * len(work.widths) for x in work.layers)
        runs = max(work.runs(work.measuring) / divergence.FEWER, work.measuring)
        return {"divergence": self._reverse(work.measuring, runs, work.rows) + runs * (touched + products)}

    def _large(self) -> dict[str, float]:
        work, speeds, layers = self.work, self.speeds, self.work.network.layers
        memory = memory_for_sums(work.network, work.config.memory)
        basis = speeds.eigen * sum(x.second * x.width for x in work.layers) / speeds.threads
        runs = work.runs(work.measuring)
        count = len(form_portions(work.network, memory))
        sums = speeds.product * sum(x.second * x.positions + work.rows * x.forward for x in work.layers)
        sums += speeds.element * work.rows * work.weights
        shared = len(list(portions(layers, memory)))
        alone = len(list(portions(layers, 2 * memory, shared=False)))
        variants = 1 if marginal(work.network) else VARIANTS
        widths, again = self._refined()
        searched = (*work.layers, *work.stored)
        return {
            "moments": self._moments(shared, work.fitting),
            "sensitivity": self._sensing(alone) + basis,
            "taylor": count * self._reverse(work.measuring, runs, work.rows) + runs * sums,
            "rounding": sum(self._nearest(x) + self._formed(x, x.blocks * len(work.widths)) for x in searched),
            "candidates": again
            * sum(self._compensated(x, widths, variants) + self._formed(x, len(widths) * variants) for x in searched),
        }

    def _refined(self) -> tuple[tuple[int, ...], float]:
        """Return the widths that are compensated, and how often."""
        config, widths = self.work.config, self.work.widths
        if config.sqnr is not None or config.top1_agreement is not None:
            return widths, 1.0
        return tuple(b for b in widths if abs(b - config.weight_bits) <= REACH), _AGAIN

    def _nearest(self, layer: LayerWork) -> float:
        """Return the seconds of rounding a layer to nearest, with each block size."""
        return layer.blocks * layer.weights * len(self.work.widths) * self.speeds.nearest / self.speeds.threads

    def _formed(self, layer: LayerWork, times: int) -> float:
        """Return the seconds of a layer's forms for so many ΔW."""
        return times * layer.weights * (self.speeds.product * layer.width + 2 * self.speeds.element)

    def _compensated(self, layer: LayerWork, widths: Iterable[int], variants: int) -> float:
        """Return the seconds of rounding a layer with compensation."""
        speeds = self.speeds
        trials = sum(speeds.few if b <= 4 else speeds.many for b in widths if b)
        trials *= (_COLUMNS + layer.width) / (_COLUMNS + WIDTH)
        factors = speeds.factor * layer.second * layer.width
        return variants * (layer.weights * trials + factors) / speeds.threads

    def _activations(self) -> dict[str, float]:
        work, speeds = self.work, self.speeds
        each = _BINNED * speeds.element * work.quantized
        clipping = work.runs(min(CLIPPING, work.fitting))
        seconds = {
            "equalize": 2 * speeds.load + 4 * self._graph + min(EQUALIZING, work.fitting) * _FETCH * speeds.forward,
            "clipping": self._reverse(min(CLIPPING, work.fitting), clipping, work.rows) + clipping * work.rows * each,
        }
        judging = work.runs(work.judging)
        if work.judging > work.measuring:
            seconds["taylor, activations"] = (
                self._reverse(work.judging, judging, work.rows) + judging * work.rows * each
            )
        doubts = _DOUBTFUL * len(work.network.activations)
        perturbed = doubts * (_CLIPS + len(work.widths))
        samples = min(
            max(float_fallback.WORK / max(perturbed * work.tensors, 1), float_fallback.SAMPLES[0]),
            float_fallback.SAMPLES[1],
            work.judging,
        )
        return seconds | {"doubtful": self._exact(doubts, perturbed, samples)}

    def _exact(self, units: float, runs: float, samples: float) -> float:
        """Return the seconds of `runs` exact measurements of `units` layers or activations on `samples` samples."""
        prepared = units * (self.speeds.load + self._graph / 2) / _PROBED
        return prepared + runs * samples * self.speeds.forward / _PROBED

    def _anchoring(self) -> dict[str, float]:
        work, config = self.work, self.work.config
        layers = len(work.layers) * sum(b <= anchoring.WEIGHT_BITS for b in work.widths)
        activations = sum(1 if a.fusion else _CLIPS for a in work.network.activations)
        samples = anchoring.WORK[config.effort] / max((layers + activations) * work.tensors, 1)
        if samples < anchoring.SAMPLES[0]:
            return {}
        most = min(samples, anchoring.SAMPLES[1])
        weights = self._exact(len(work.layers), layers, min(most, work.measuring))
        others = self._exact(len(work.network.activations), activations, min(most, work.judging))
        return {"ties": weights + others}

    def _probe(self) -> float:
        work = self.work
        channels = sum(x.variants * x.channels for x in work.layers)
        runs = channels * len(work.widths) + _CLIPS**2 * len(work.network.activations)
        return self._exact(len(work.layers) + len(work.network.activations), runs, work.measuring)

    def _refinement(self, measured: dict[str, float]) -> float:
        """Return the seconds of all trials; `measured` has those of the steps that re-rounding repeats."""
        work, one = self.work, self.speeds.forward
        units, judging = len(work.layers) + len(work.network.activations), min(work.measuring, JUDGING)
        plan = EFFORTS[work.config.effort].within(
            int(judging * work.tensors), units, len(work.network.activations), len(work.layers)
        )
        trial = self._graph + _EMITTED * self.speeds.load + judging * one
        fits = len(plan.fits) * work.fitting * _FETCH * one
        again = plan.portions * work.fitting * _FETCH * one + measured.get("taylor", 0.0) if plan.portions else 0.0
        ridge = plan.ridges * work.fitting * _FETCH * one * (1.0 if plan.portions else _SEARCHED)
        return (2 + _SEARCHED * (plan.trials - 2)) * trial + fits + again + ridge

    def _tuning(self, others: float) -> dict[str, float]:
        """Return the seconds of tuning by gradients; with --minutes, what the `others` leave of these."""
        work, config = self.work, self.work.config
        if config.effort != "best" or is_huge(work.network.model):
            return {}
        if config.minutes is not None:
            return {TUNING: max(60 * config.minutes - others, 0.0)}
        step = step_batch(work.observation) * _TUNED * self.speeds.forward + _UPDATED * work.weights
        steps = _WITH_TRIALS * default_steps(work.network, work.observation)
        return {TUNING: steps * step + 2 * self.speeds.load + 6 * self._graph}

    def _parts(self) -> float:
        """Return the seconds of the shares of the outputs' parts."""
        parts = len(self.work.observation.metric.parts)
        return parts * self._reverse(min(DRAWS, self.work.measuring), DRAWS, 1) if parts > 1 else 0.0
