"""The steps that measure one network, each kept by the checkpoint as soon as it is done."""

from dataclasses import dataclass, replace

import numpy as np

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.calibration.split import judging, split
from rdoq_onnx.candidates.activations import refined
from rdoq_onnx.candidates.candidates import Candidates, widest
from rdoq_onnx.candidates.make import make_candidates
from rdoq_onnx.candidates.moment_passes import collect, passes
from rdoq_onnx.candidates.sensitivity import with_sensitivity
from rdoq_onnx.config import Config
from rdoq_onnx.curves.checkpoint import Steps
from rdoq_onnx.curves.float_fallback import SAMPLES, checked, doubtful
from rdoq_onnx.curves.measurement import Tables
from rdoq_onnx.curves.taylor import first_order
from rdoq_onnx.errors import ModelError
from rdoq_onnx.gradients.batch_sizes import forward_batch, reverse_batch, with_memory
from rdoq_onnx.observation.observe import Observation
from rdoq_onnx.observation.tail_model import with_unseen
from rdoq_onnx.probing.distortions import Distortions
from rdoq_onnx.probing.missing_curves import complete, lost_parts
from rdoq_onnx.probing.probe import Prober, exact
from rdoq_onnx.system.progress import Advance, Unfinished
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.threads import Workers

CLIPPING = 32  # samples that the range of each activation's quantizer is first found on
SENSING = 256  # samples that the sensitivity of rounding is found on


@dataclass(frozen=True)
class Bench:
    """The steps that measure `network`, whose outputs are the tensors that distortion is measured of."""

    network: Network
    config: Config
    samples: Samples
    observation: Observation
    runtime: Runtime
    pool: Workers
    keep: Steps

    def candidates(self) -> Candidates:
        """All channels and activations at all widths."""
        found: Candidates | None = self.keep.get("candidates")
        if found is not None:
            return found
        network, progress = self.network, self.keep.progress
        fitting, _ = split(self.samples, self.config.seed)
        with progress.step("moments", len(fitting) * passes(network)) as advance:
            moments = with_memory(
                lambda batch: collect(network, fitting, batch, self.runtime, self.pool, advance),
                forward_batch(network, self.observation, self.runtime, len(fitting)), self.observation,
            )  # fmt: skip
        sensing = fitting.some(SENSING)
        with progress.step("sensitivity", len(sensing)) as advance:
            size = reverse_batch(network, self.observation, self.runtime, len(sensing), exact=False)
            moments = with_memory(lambda batch: with_sensitivity(
                moments, replace(network, activations=()), sensing, self.observation.metric, self.runtime,
                batch=batch, seed=self.config.seed, workers=self.pool, advance=advance,
            ), size, self.observation)  # fmt: skip
        offered = tuple(sorted({min(w, widest(network)) for w in self.config.widths}))
        reach, few = {a.tensor: self.observation.reach(a.tensor) for a in network.activations}, self.observation.few
        return self.keep.step("candidates", 1, lambda _: make_candidates(
            network, offered, reach, moments, self.pool, uncertain=few
        ))  # fmt: skip

    def clipped(self, candidates: Candidates) -> Tables:
        """Fewer, finer quantizers for each activation than `candidates` has: those around the best on some samples."""
        if not self.network.activations:
            return ()
        chosen = split(self.samples, self.config.seed)[0].some(CLIPPING)
        found = self.keep.step("clipping", len(chosen), lambda advance: self._activations(candidates, chosen, advance))
        likely = self._with_unseen(candidates, found).activations
        return tuple(
            table if activation.tensor in found.missing else {
                bits: tuple(refined(several[int(np.argmin(values[bits]))], *self.observation.reach(activation.tensor)))
                if len(several) > 1 else several
                for bits, several in table.items()
            }
            for activation, table, values in zip(
                self.network.activations, candidates.activations, likely, strict=True
            )
        )  # fmt: skip

    def first_order(self, candidates: Candidates) -> Distortions:
        """First-order curves; exact ones of what cannot be differentiated."""
        measuring = split(self.samples, self.config.seed)[1]
        judges = judging(self.samples, self.config.seed)
        together = len(judges) == len(measuring)
        network = self.network if together else replace(self.network, activations=())
        found = self.keep.step("taylor", len(measuring), lambda advance: self._first_order(
            network, candidates if together else replace(candidates, activations=()), measuring, advance,
            self.keep.unfinished("taylor"),
        ))  # fmt: skip
        if not together:
            alone = self.keep.step(
                "taylor, activations", len(judges), lambda advance: self._activations(candidates, judges, advance)
            )
            found = replace(found, activations=alone.activations, missing={**found.missing, **alone.missing})
        measured = found
        if found.missing:
            prober = self._prober(measuring)
            each, parts = sum(self.observation.sizes.values()), sum(map(len, lost_parts(found, self.network)))
            measured = self.keep.step("probe", parts, lambda advance: complete(
                found, self.network, candidates, prober, each, advance
            ))  # fmt: skip
        _check_finite(self.network, measured)
        return measured

    def checked(
        self, candidates: Candidates, coarse: Tables, measured: Distortions
    ) -> tuple[Candidates, Distortions]:
        """The same with what first order may misjudge measured exactly."""
        found = candidates, measured
        doubts = doubtful(self.network, measured, self.observation.metric.power)
        if doubts:
            prober = self.check()
            found = self.keep.step("doubtful", len(doubts), lambda advance: checked(
                self.network, candidates, coarse, measured, doubts, prober, advance
            ))  # fmt: skip
        candidates, measured = found
        return candidates, self._with_unseen(candidates, measured)

    def exact(self, candidates: Candidates) -> Distortions:
        """All curves, measured exactly."""
        prober = self._prober(split(self.samples, self.config.seed)[1])
        parts = len(self.network.layers) + len(self.network.activations)
        return self._with_unseen(candidates, self.keep.step("probe", parts, lambda advance: exact(
            self.network, candidates, prober, advance=advance, unfinished=self.keep.unfinished("probe")
        )))  # fmt: skip

    def _with_unseen(self, candidates: Candidates, found: Distortions) -> Distortions:
        tensors = [a.tensor for a in self.network.activations]
        tails = self.observation.tails
        return replace(found, activations=with_unseen(tensors, candidates.activations, found.activations, tails))

    def _activations(self, candidates: Candidates, samples: Samples, advance: Advance) -> Distortions:
        """First-order curves of activations alone."""
        candidates = replace(candidates, means=(), weights=())
        return self._first_order(replace(self.network, layers=()), candidates, samples, advance)

    def _first_order(
        self, network: Network, candidates: Candidates, samples: Samples, advance: Advance,
        unfinished: Unfinished | None = None,
    ) -> Distortions:  # fmt: skip
        return with_memory(lambda batch: first_order(
            network, candidates, samples, self.observation.metric, self.runtime,
            batch=batch, seed=self.config.seed, workers=self.pool, advance=advance, unfinished=unfinished,
        ), reverse_batch(network, self.observation, self.runtime, len(samples)), self.observation)  # fmt: skip

    def check(self) -> Prober:
        """Exact measurements of what first order may misjudge."""
        return self._prober(judging(self.samples, self.config.seed).some(SAMPLES))

    def _prober(self, samples: Samples) -> Prober:
        return Prober(self.network, samples, self.observation.metric, self.runtime, self.observation.batching)


def _check_finite(network: Network, measured: Distortions) -> None:
    found = [(x.name, list(w)) for x, w in zip(network.layers, measured.weights, strict=True)]
    found += [(a.tensor, list(v.values())) for a, v in zip(network.activations, measured.activations, strict=True)]
    for name, curves in found:
        if not all(np.isfinite(c).all() for c in curves):
            raise ModelError(f"the distortion of {name!r} is not finite; check its weights, or --exclude it")
