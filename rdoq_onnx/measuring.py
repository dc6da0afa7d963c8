"""Samples in, curves out: candidates at every width, and what each would do to the network's output."""

from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.analysis import Network, analyse
from rdoq_onnx.backward import draws
from rdoq_onnx.batch_sizes import forward_batch, reverse_batch, with_memory
from rdoq_onnx.candidates import Candidates, make_candidates, widest
from rdoq_onnx.completion import complete, lost_parts
from rdoq_onnx.config import Config
from rdoq_onnx.curves_file import Steps, Store
from rdoq_onnx.equalization import equalize, exponent_for
from rdoq_onnx.errors import ModelError
from rdoq_onnx.fallback import SAMPLES, Tables, Unheld, checked, doubtful, in_float, unheld
from rdoq_onnx.measurement import Measurement, aimed_at, curves_of, judging, split
from rdoq_onnx.moments import collect, passes
from rdoq_onnx.observation import Observation, observe, targets
from rdoq_onnx.parallel import Workers, workers
from rdoq_onnx.probe import Prober, exact
from rdoq_onnx.progress import Advance, Progress, Unfinished
from rdoq_onnx.quantizer import Affine, WeightCodes, refined
from rdoq_onnx.runtime import Runtime
from rdoq_onnx.samples import Samples
from rdoq_onnx.sensitivity import with_sensitivity
from rdoq_onnx.tails import with_unseen
from rdoq_onnx.taylor import Distortions, first_order
from rdoq_onnx.variants import expected, picked, squared_errors, steadied

EQUALIZING = 32  # samples that channel ranges are found on
CLIPPING = 32  # samples that the range of each activation's quantizer is first found on
SENSING = 256  # samples that the sensitivity of rounding is found on


def regime(config: Config) -> str:
    """What of the activation budget a measurement depends on, as a name."""
    return "weights" if config.activation_bits is None else f"activations {exponent_for(config):g}"


def measure_network(
    network: Network, config: Config, samples: Samples, runtime: Runtime, progress: Progress, store: Store | None = None
) -> Measurement:
    """Observe the float network, make all candidates, measure all curves. What `store` has is not done again.

    Rounding is fitted to one part of the samples and measured on the other: curves of the samples that made the
    rounding would promise too much.
    """
    if not network.layers:
        return _unsearched(network, samples, runtime)
    keep = Steps(store or Store(), progress, regime(config))
    fitting, _ = split(samples, config)
    with workers(config.threads) as pool:
        source, plain = network.model, network
        evened = keep.step("equalize", 1, lambda _: equalize(plain, config, fitting.some(EQUALIZING), runtime).model)
        network = analyse(evened, config)
        aimed = aimed_at(network, targets(network.model))
        observation = keep.step("observe", 1, lambda _: observe(aimed, samples, runtime))
        bench = _Bench(aimed, config, samples, observation, runtime, pool, keep)
        candidates = bench.candidates()
        if config.measure == "probe":
            measured = bench.exact(candidates)
        else:
            coarse = candidates.activations
            candidates = replace(candidates, activations=bench.clipped(candidates))
            measured = bench.first_order(candidates)
            candidates, measured = bench.checked(candidates, coarse, measured)
        lost = unheld(aimed, candidates, measured, config, bench.check())
    seen = draws(len(split(samples, config)[1]), observation.metric.elements)
    return _chosen(source, network, observation, candidates, measured, lost, seen)


def _unsearched(network: Network, samples: Samples, runtime: Runtime) -> Measurement:
    """No curves: all that is quantized of `network` is outside the search."""
    observation = observe(aimed_at(network, targets(network.model)), samples, runtime)
    curves = curves_of(network, observation, (), [], [])
    return Measurement(network.model, network, observation, (), (), (), (), curves, Unheld({}, {}), {})


@dataclass(frozen=True)
class _Bench:
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
        fitting, _ = split(self.samples, self.config)
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
        chosen = split(self.samples, self.config)[0].some(CLIPPING)
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
        measuring = split(self.samples, self.config)[1]
        judges = judging(self.samples, self.config)
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
        prober = self._prober(split(self.samples, self.config)[1])
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
        return self._prober(judging(self.samples, self.config).some(SAMPLES))

    def _prober(self, samples: Samples) -> Prober:
        return Prober(self.network, samples, self.observation.metric, self.runtime, self.observation.batching)


def _check_finite(network: Network, measured: Distortions) -> None:
    found = [(x.name, list(w)) for x, w in zip(network.layers, measured.weights, strict=True)]
    found += [(a.tensor, list(v.values())) for a, v in zip(network.activations, measured.activations, strict=True)]
    for name, curves in found:
        if not all(np.isfinite(c).all() for c in curves):
            raise ModelError(f"the distortion of {name!r} is not finite; check its weights, or --exclude it")


def _chosen(
    source: onnx.ModelProto,
    network: Network,
    observation: Observation,
    candidates: Candidates,
    measured: Distortions,
    lost: Unheld,
    seen: int,
) -> Measurement:
    """The best variant of rounding for each channel and width, the best clipping for each activation and width.

    lost: what stays in float. seen: the draws that each curve is the mean of.
    """
    codes: list[dict[int, WeightCodes]] = []
    weights: list[NDArray[np.float64]] = []
    means = []
    for layer, mean, variants, found in zip(
        network.layers, candidates.means, candidates.weights, measured.weights, strict=True
    ):
        if layer.name in lost.layers:
            continue
        likely = expected(found, seen)
        best = likely.argmin(axis=0)
        chosen = [picked([v[k] for v in variants], best[:, k]) for k in range(len(candidates.widths))]
        errors = squared_errors(chosen, network.rows(layer))
        means.append(mean)
        codes.append(dict(zip(candidates.widths, chosen, strict=True)))
        weights.append(steadied(np.take_along_axis(likely, best[None], axis=0)[0], errors, seen))
    left = in_float(network, lost)
    kept = {a.tensor for a in left.activations}
    quantizers: list[dict[int, Affine]] = []
    activations: list[dict[int, float]] = []
    for activation, table, values in zip(
        network.activations, candidates.activations, measured.activations, strict=True
    ):
        if activation.tensor in kept:
            tightest = {bits: int(np.argmin(v)) for bits, v in values.items()}
            quantizers.append({bits: table[bits][k] for bits, k in tightest.items()})
            activations.append({bits: float(values[bits][k]) for bits, k in tightest.items()})
    curves = curves_of(left, observation, candidates.widths, weights, activations)
    return Measurement(
        source, left, observation, tuple(codes), tuple(means), (None,) * len(codes), tuple(quantizers), curves,
        lost, measured.missing,
    )
