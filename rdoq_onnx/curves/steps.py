"""The steps that measure one network; the checkpoint keeps each result as soon as it is complete."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis.analyse import integer_ranges
from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.broadening import broadened, narrow_inputs
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.calibration.split import SampleSplit
from rdoq_onnx.candidates.activations import refined
from rdoq_onnx.candidates.candidates import ActivationCandidates, Candidates, widest
from rdoq_onnx.candidates.make import make_candidates
from rdoq_onnx.candidates.moment_passes import collect, passes
from rdoq_onnx.candidates.moments import Moments
from rdoq_onnx.candidates.more_images import better_suited, with_copies
from rdoq_onnx.candidates.sensitivity import with_sensitivity
from rdoq_onnx.candidates.table_rows import TableRows, table_rows
from rdoq_onnx.config import Config
from rdoq_onnx.curves.checkpoint import Steps
from rdoq_onnx.curves.float_fallback import SAMPLES, WORK, checked, doubtful
from rdoq_onnx.curves.taylor import first_order
from rdoq_onnx.errors import ModelError
from rdoq_onnx.gradients.batch_sizes import forward_batch, host_batch, least_draws, reverse_batch, with_memory
from rdoq_onnx.gradients.plan import LEAST_DRAWS, ReversePlan
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.observation.observe import Observation
from rdoq_onnx.observation.tail_model import with_extreme_values
from rdoq_onnx.probing.distortions import Distortions
from rdoq_onnx.probing.missing_curves import complete, lost_parts
from rdoq_onnx.probing.probe import Prober, exact
from rdoq_onnx.system.progress import Advance, Unfinished
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.threads import Workers

Float = NDArray[np.float64]

CLIPPING = 32  # samples of the coarse search for each activation's range
SENSING = 256  # samples that sensitivities are measured on
# Of samples that show few ids, one value for so many, and two at least: with two, which halve the spread between
# channels, 36 sentences of one genre give 1 dB more on others.
_ALIKE, _PER_ALIKE = 2, 32


@dataclass(frozen=True)
class Bench:
    """The steps that measure `network`, whose outputs are the measured tensors."""

    network: Network
    config: Config
    split: SampleSplit
    observation: Observation
    runtime: Runtime
    pool: Workers
    keep: Steps

    def without_layers(self) -> "Bench":
        """Return the bench of the activations alone."""
        return replace(self, network=replace(self.network, layers=()))

    def candidates(self) -> Candidates:
        """Make the candidates of all channels and activations at all widths."""
        kept: Candidates | None = self.keep.get("candidates")
        if kept is not None:
            return kept
        network = self.network
        moments = self._moments() if network.layers else ()
        offered = tuple(sorted({min(w, widest(network)) for w in self.config.widths}))
        reach, few = {a.tensor: self.observation.reach(a.tensor) for a in network.activations}, self.observation.few
        return self.keep.step(
            "candidates", 1, lambda _: make_candidates(network, offered, reach, moments, self.pool, uncertain=few)
        )

    def _moments(self) -> tuple[Moments, ...]:
        network, progress, best = self.network, self.keep.progress, self.config.effort == "best"
        fitting, shown = self.split.fitting, self.broadened()
        more = with_copies(network, fitting, self.config.seed) if best else None
        tried = [shown] if more is None else [shown, more, self.split.measuring]
        with progress.step("moments", sum(map(len, tried)) * passes(network)) as advance:
            moments, *others = [self._collected(samples, advance) for samples in tried]
        found = self._sensed(dict(zip(network.layers, moments, strict=True)), fitting.some(SENSING), "sensitivity")
        if more is not None and (wider := better_suited(network.layers, moments, *others)):
            found |= self._sensed(wider, more, "sensitivity with copies")
        return tuple(found.values())

    def _collected(self, samples: Samples, advance: Advance) -> tuple[Moments, ...]:
        network, seen, runtime = self.network, self.observation, self.runtime
        size = forward_batch(network, seen, runtime, len(samples))
        return with_memory(lambda batch: collect(network, samples, batch, runtime, self.pool, advance), size, seen)

    def _sensed(self, moments: Mapping[Layer, Moments], samples: Samples, name: str) -> dict[Layer, Moments]:
        """Add the sensitivity of each layer on `samples`."""
        network, found = replace(self.network, layers=tuple(moments), activations=()), tuple(moments.values())
        with self.keep.progress.step("sensitivity", len(samples)) as advance:
            size = reverse_batch(self.network, self.observation, self.runtime, len(samples), exact=False)
            plan = replace(self.plan(network, samples, name), draws=LEAST_DRAWS)
            sensed = with_memory(
                lambda batch: with_sensitivity(replace(plan, batch=batch), found, advance), size, self.observation
            )
        return dict(zip(moments, sensed, strict=True))

    def broadened(self) -> Samples:
        """Return the samples that moments are of."""
        return broadened(self.split.fitting, integer_ranges(self.network.model), self.config.seed)

    def independent(self, draws: int) -> int:
        """Return how many of `draws` values a mean counts as: those of samples that show few ids are much alike."""
        alike = narrow_inputs(self.split.fitting, integer_ranges(self.network.model))
        return min(draws, max(_ALIKE, len(self.split.measuring) // _PER_ALIKE)) if alike else draws

    def table_rows(self) -> tuple[dict[str, TableRows], dict[str, str]]:
        """Measure the rows of all tables; also return those without an adjoint, with the reason."""
        network, seen = self.network, self.split.seen
        tables = [x for x in network.unmultiplied if x.looked_up]
        if not tables:
            return {}, {}
        plan = self.plan(replace(network, layers=tuple(tables), activations=()), seen, "tables", in_graph=False)
        return self.keep.step(
            "tables",
            len(seen),
            lambda advance: with_memory(
                lambda batch: table_rows(replace(plan, batch=batch), tables, advance), plan.batch, self.observation
            ),
        )

    def clipped(self, candidates: Candidates) -> Candidates:
        """Replace the quantizers of each activation by fewer, finer ones around the best on some samples."""
        if not self.network.activations:
            return candidates
        chosen = self.split.fitting.some(CLIPPING)
        measured = self.keep.step(
            "clipping", len(chosen), lambda advance: self._activations(candidates, chosen, advance)
        )
        distortions = self._with_extreme_values(candidates, measured).activations
        activations = tuple(
            each if each.activation.tensor in measured.missing else self._finer(each, values)
            for each, values in zip(candidates.activations, distortions, strict=True)
        )
        return replace(candidates, activations=activations)

    def _finer(self, candidates: ActivationCandidates, values: Mapping[int, Float]) -> ActivationCandidates:
        reach = self.observation.reach(candidates.activation.tensor)
        table = {
            bits: tuple(refined(tried[int(np.argmin(values[bits]))], *reach)) if len(tried) > 1 else tried
            for bits, tried in candidates.table.items()
        }
        return replace(candidates, table=table)

    def first_order(self, candidates: Candidates) -> Distortions:
        """Measure first-order curves, and exact ones for what has no adjoint."""
        if not self.network.layers and not self.network.activations:
            return Distortions((), (), {})
        measuring, judging = self.split.measuring, self.split.judging
        together = len(judging) == len(measuring)
        network = self.network if together else replace(self.network, activations=())
        measured = self.keep.step(
            "taylor",
            len(measuring),
            lambda advance: self._first_order(
                self.plan(network, measuring, "taylor"),
                candidates if together else replace(candidates, activations=()),
                advance,
                self.keep.unfinished("taylor"),
            ),
        )
        if not together:
            name = "taylor, activations"
            own = self.keep.step(
                name, len(judging), lambda advance: self._activations(candidates, judging, advance, name)
            )
            measured = replace(measured, activations=own.activations, missing={**measured.missing, **own.missing})
        if measured.missing:
            incomplete, prober = measured, self._prober(measuring)
            cost, parts = sum(self.observation.sizes.values()), sum(map(len, lost_parts(measured, candidates)))
            measured = self.keep.step(
                "probe", parts, lambda advance: complete(incomplete, candidates, prober, cost, advance)
            )
        _check_finite(self.network, measured)
        return measured

    def checked(
        self, candidates: Candidates, coarse: Candidates, measured: Distortions
    ) -> tuple[Candidates, Distortions]:
        """Measure exactly the activations that first order may misjudge."""
        indices = doubtful(self.network, measured, self.observation)
        doubts = {k: (table := coarse.activations[k].table)[max(table)] for k in indices}
        if doubts:
            runs = sum(len(candidates.widths) + len(clips) for clips in doubts.values())
            first, prober = (candidates, measured), self.check(runs)
            candidates, measured = self.keep.step(
                "doubtful", len(doubts), lambda advance: checked(*first, doubts, prober, advance)
            )
        return candidates, self._with_extreme_values(candidates, measured)

    def exact(self, candidates: Candidates) -> Distortions:
        """Measure all curves exactly."""
        prober, so_far = self._prober(self.split.measuring), self.keep.unfinished("probe")
        parts = len(self.network.layers) + len(self.network.activations)
        measured = self.keep.step("probe", parts, lambda advance: exact(candidates, prober, advance, so_far))
        return self._with_extreme_values(candidates, measured)

    def _with_extreme_values(self, candidates: Candidates, measured: Distortions) -> Distortions:
        tables = {each.activation.tensor: each.table for each in candidates.activations}
        activations = with_extreme_values(tables, measured.activations, self.observation.extremes)
        return replace(measured, activations=activations)

    def _activations(self, candidates: Candidates, samples: Samples, advance: Advance, name: str = "") -> Distortions:
        """Measure first-order curves of activations only; name: as in `plan`."""
        plan = self.plan(replace(self.network, layers=()), samples, name)
        return self._first_order(plan, replace(candidates, layers=()), advance)

    def _first_order(
        self, plan: ReversePlan, candidates: Candidates, advance: Advance, unfinished: Unfinished | None = None
    ) -> Distortions:
        return with_memory(
            lambda batch: first_order(replace(plan, batch=batch), candidates, advance, unfinished),
            plan.batch,
            self.observation,
        )

    def plan(self, network: Network, samples: Samples, name: str = "", in_graph: bool = True) -> ReversePlan:
        """Return the plan of reverse passes of `network` over `samples`.

        name: of what they sum, as in `Sum`. in_graph: whether nodes of the graph can sum it.
        """
        count, seen = len(samples), self.observation
        batch = reverse_batch(network, seen, self.runtime, count) if in_graph else host_batch(seen, count)
        metric, seed = self.observation.metric, self.config.seed
        plan = ReversePlan(network, samples, metric, self.runtime, self.pool, batch, seed)
        return replace(plan, draws=least_draws(self.observation), name=name)

    def check(self, runs: int) -> Prober:
        """Return a prober for what first order may misjudge, for `runs` perturbations."""
        affordable = WORK / max(runs * sum(self.observation.sizes.values()), 1)
        return self._prober(self.split.judging.some(int(np.clip(affordable, *SAMPLES))))

    def _prober(self, samples: Samples) -> Prober:
        return Prober(self.network, samples, self.observation.metric, self.runtime, self.observation.batching)


def _check_finite(network: Network, measured: Distortions) -> None:
    named = [(x.name, list(w)) for x, w in zip(network.layers, measured.weights, strict=True)]
    named += [(a.tensor, list(v.values())) for a, v in zip(network.activations, measured.activations, strict=True)]
    for name, curves in named:
        if not all(np.isfinite(c).all() for c in curves):
            raise ModelError(f"the distortion of {name!r} is not finite; check its weights, or --exclude it")
