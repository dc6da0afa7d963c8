"""First-order curves of the candidates that a measurement chose, one a width."""

from dataclasses import replace

from rdoq_onnx.candidates.candidates import ActivationCandidates, Candidates, LayerCandidates
from rdoq_onnx.curves.curves import Curves
from rdoq_onnx.curves.measurement import Measurement, curves_of
from rdoq_onnx.curves.shrinkage import shrunk_curves, squared_errors
from rdoq_onnx.curves.taylor import first_order
from rdoq_onnx.gradients.batch_sizes import with_memory
from rdoq_onnx.gradients.plan import ReversePlan
from rdoq_onnx.system.progress import Advance


def chosen_curves(measurement: Measurement, plan: ReversePlan, advance: Advance) -> Curves | None:
    """Measure the candidates of `measurement` by the reverse passes of `plan`; None if some have no adjoint."""
    candidates, observation = _as_candidates(measurement), measurement.observation
    found = with_memory(
        lambda batch: first_order(replace(plan, batch=batch), candidates, advance), plan.batch, observation
    )
    if found.missing:
        return None
    network, seen = measurement.network, plan.averaged()
    steady = [
        shrunk_curves(curves[0], squared_errors(each.variants[0], network.rows(each.layer)), seen)
        for each, curves in zip(candidates.layers, found.weights, strict=True)
    ]
    activations = [{b: float(v[0]) for b, v in table.items()} for table in found.activations]
    return curves_of(network, observation, candidates.widths, steady, activations)


def _as_candidates(measurement: Measurement) -> Candidates:
    """Return the candidates that `measurement` chose, one per width."""
    widths = tuple(measurement.layers[0].codes)
    layers = (LayerCandidates(x.layer, x.mean, (tuple(x.codes[b] for b in widths),)) for x in measurement.layers)
    activations = (
        ActivationCandidates(x.activation, {b: (q,) for b, q in x.quantizers.items()}) for x in measurement.activations
    )
    return Candidates(widths, tuple(layers), tuple(activations))
