"""Gradient descent on the variables: each step runs the quantized network forward and backward on a batch.

The targets are what the float network computes on the same batch. All that is random depends on the seed and the number
of the step alone, so that a run can go on where another stopped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.augmentation import augmented
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.gradients.backward import static
from rdoq_onnx.gradients.plan import differentiated
from rdoq_onnx.gradients.reverse import Reverse, straight_through
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.reconstruction.adam import Adam
from rdoq_onnx.reconstruction.objective import LOSS, Objective, target
from rdoq_onnx.reconstruction.parametrized import Parametrized, parametrized
from rdoq_onnx.reconstruction.variable_set import VariableSet
from rdoq_onnx.reconstruction.variables import Kind
from rdoq_onnx.reconstruction.work import BATCH, step_batch
from rdoq_onnx.system.runtime import Runtime, Session

Array = NDArray[Any]

_INSIDE = 32  # tensors inside the network that the loss is of
_PULL = 0.4  # of weights to their integers, in rates of learning
_OPEN = np.ones(1, np.float32)
_WARM = 20  # steps in which the rates rise
_FEW = 200  # steps under which they stay lower
RATES: Mapping[Kind, float] = {"codes": 0.02, "scales": 0.005, "biases": 0.005, "steps": 0.003, "zeros": 0.03}


@dataclass(frozen=True)
class Recipe:
    """How to tune.

    inside: the weight of tensors inside the network in the loss. rates: the rate of learning of each kind of variable;
    kinds without one stay. moved: whether images are augmented. left_out: the share of the activations' quantizers that
    each step leaves out, at random.
    """

    inside: float = 12.0
    rates: Mapping[Kind, float] | None = None
    moved: bool = False
    left_out: float = 0.0

    def rate(self, kind: Kind, step: int, steps: int) -> float:
        """Return the rate of step number `step` of `steps`: it rises, then falls as a cosine; few steps stay nearby."""
        rise = min(1.0, (step + 1) / _WARM) * min(1.0, steps / _FEW)
        rates = RATES if self.rates is None else self.rates
        return float(rates.get(kind, 0.0) * rise * (1 + np.cos(np.pi * step / steps)) / 2)


DEFAULT = Recipe()


@dataclass(frozen=True)
class _Part:
    """The samples of one shape, and the graph that runs `batch` of them forward and backward."""

    samples: Samples
    batch: int
    reverse: Reverse
    session: Session

    def adjoints(self, feeds: Mapping[str, Array]) -> tuple[float, dict[str, Array]]:
        """Return the loss, and the adjoints of the graph's inputs; 0 for those without any."""
        reverse = self.reverse
        loss, *values = self.session.run(
            {**feeds, reverse.seeds[LOSS]: np.ones(1, np.float32)}, [LOSS, *reverse.adjoints.values()]
        )
        found = dict(zip(reverse.adjoints, values, strict=True))
        return float(loss[0]), found | {name: np.zeros_like(feeds[name]) for name in reverse.missing}


@dataclass(frozen=True)
class Trainer:
    """Tunes `variables`. floats: gives the tensors of `objective` of the float network."""

    variables: VariableSet
    adam: Adam
    parts: tuple[_Part, ...]
    objective: Objective
    floats: Session
    recipe: Recipe
    seed: int
    gates: tuple[str, ...] = ()

    @classmethod
    def of(cls, allocation: Allocation, samples: Samples, runtime: Runtime, recipe: Recipe, seed: int) -> "Trainer":
        """Start at `allocation`; `samples` are those that rounding is fitted to."""
        measurement = allocation.measurement
        network, metric = measurement.aimed, measurement.observation.metric
        shapes = differentiated(samples).by_shape()
        batches = [part.batch or min(step_batch(measurement.observation), len(part)) for part in shapes]
        graph = parametrized(allocation, gated=recipe.left_out > 0)
        inside = _inside(network)
        spreads, powers = _scales(network, graph, inside, shapes[0].feeds(slice(0, batches[0])), runtime)
        objective = Objective(metric, powers, recipe.inside)
        floats = runtime.session(with_outputs(network.model, objective.tensors), "all")
        variables = VariableSet.of(allocation, graph, spreads)
        parts = []
        for part, batch in zip(shapes, batches, strict=True):
            feeds = part.feeds(slice(0, batch))
            targets = _targets(objective, floats, feeds)
            sizes = {name: targets[target(name)].shape for name in objective.tensors}
            model = objective.appended(graph.model, sizes, batch)
            feeds = {**feeds, **targets, **variables.feeds(), **dict.fromkeys(graph.gates, _OPEN)}
            reverse = straight_through(static(model, feeds), graph.inputs, [LOSS], feeds, runtime)
            parts.append(_Part(part, batch, reverse, runtime.session(reverse.model, "all")))
        adam = Adam.of([array for _, array in variables.arrays])
        return cls(variables, adam, tuple(parts), objective, floats, recipe, seed, graph.gates)

    @property
    def batch(self) -> int:
        """The samples of a step."""
        return self.parts[0].batch

    @property
    def reached(self) -> bool:
        """Whether any variable has a gradient."""
        return any(part.reverse.adjoints for part in self.parts)

    def _rate(self, kind: Kind, number: int, steps: int) -> float:
        """Return the rate of a step: small batches have noisy gradients, and a scale moves a whole channel."""
        calm = (self.batch / BATCH) ** (0.5 if kind == "codes" else 1.0)
        return float(calm * self.recipe.rate(kind, number, steps))

    def step(self, number: int, steps: int) -> float:
        """Take step `number`, from 0, of `steps`; return the loss before it."""
        part, chosen = self._chosen(number)
        feeds: Mapping[str, Array] = part.samples.feeds(chosen)
        if self.recipe.moved:
            feeds = augmented(feeds, np.random.default_rng([self.seed, number]))
        targets = _targets(self.objective, self.floats, feeds)
        loss, found = part.adjoints({**feeds, **targets, **self.variables.feeds(), **self._gated(number)})
        if np.isfinite(loss):
            rates = [self._rate(kind, number, steps) for kind, _ in self.variables.arrays]
            self.adam.step(self.variables.gradients(found), rates, number + 1)
            self.variables.confine(_PULL * self._rate("codes", number, steps))
        return loss

    def _gated(self, number: int) -> dict[str, Array]:
        """Return the values of the gates in a step."""
        kept = np.random.default_rng([self.seed, 2, number]).random(len(self.gates)) >= self.recipe.left_out
        return {name: np.full(1, value, np.float32) for name, value in zip(self.gates, kept, strict=True)}

    def _chosen(self, number: int) -> tuple[_Part, NDArray[np.int64]]:
        """Return the batch of a step: the samples are drawn without replacement, epoch by epoch."""
        counts = [max(len(part.samples) // part.batch, 1) for part in self.parts]
        epoch, place = divmod(number, sum(counts))
        rng = np.random.default_rng([self.seed, 1, epoch])
        which = rng.permutation(np.repeat(np.arange(len(counts)), counts))
        part = self.parts[which[place]]
        groups = rng.permutation(len(part.samples) // (part.samples.batch or 1))
        first = int((which[:place] == which[place]).sum())
        step = part.samples.batch or 1
        rows = groups[first * part.batch // step : (first + 1) * part.batch // step]
        return part, np.sort((rows[:, None] * step + np.arange(step)).reshape(-1))


def _inside(network: Network) -> list[str]:
    """Choose tensors inside the network, evenly spaced among the activations or, without any, the inputs of layers.

    A branch holds the values of the tensor that it branches from, one of them suffices.
    """
    inputs = {value.name for value in network.model.graph.input}
    read = {use.data: use.data for layer in network.layers for use in layer.uses}
    stems = {a.tensor: a.stem for a in network.activations} or read
    tensors = [t for t, stem in stems.items() if t not in inputs and (t == stem or stem not in stems)]
    return tensors if len(tensors) <= _INSIDE else [tensors[k * len(tensors) // _INSIDE] for k in range(_INSIDE)]


def _targets(objective: Objective, floats: Session, feeds: Mapping[str, Array]) -> dict[str, Array]:
    values = floats.run(feeds, objective.tensors)
    return {target(name): value for name, value in zip(objective.tensors, values, strict=True)}


def _scales(
    network: Network, graph: Parametrized, inside: Sequence[str], feeds: Mapping[str, Array], runtime: Runtime
) -> tuple[dict[int, float], dict[str, float]]:
    """Return the spread of the outputs of each layer with a bias, and the power of each tensor `inside`."""
    outputs = {k: network.layers[k].uses[0].output for k in graph.biases}
    names = list(dict.fromkeys([*outputs.values(), *inside]))
    if not names:
        return {}, {}
    session = runtime.session(with_outputs(network.model, names), "all")
    values = dict(zip(names, session.run(feeds, names), strict=True))
    spreads = {k: float(values[name].std()) for k, name in outputs.items()}
    return spreads, {name: float(np.square(values[name], dtype=np.float64).mean()) for name in inside}
