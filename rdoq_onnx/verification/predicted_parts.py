"""What the curves predict for each part of the outputs: their sum, in the shares that first order finds."""

from dataclasses import replace

import numpy as np

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.candidates.candidates import ActivationCandidates, Candidates, LayerCandidates
from rdoq_onnx.curves.measurement import aimed_at
from rdoq_onnx.curves.taylor import first_order
from rdoq_onnx.emission.quantized_model import mixed
from rdoq_onnx.gradients.batch_sizes import reverse_batch, with_memory
from rdoq_onnx.gradients.plan import ReversePlan
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.threads import workers

DRAWS = 8  # of random v: a part's share sums all curves, so it is less noisy than one of them


def predicted_parts(allocation: Allocation, samples: Samples, runtime: Runtime) -> tuple[float, ...]:
    """Return what each part adds to the predicted δ of `allocation`; equal shares where first order gives none."""
    observation = allocation.measurement.observation
    metric = observation.metric
    if len(metric.parts) == 1 or not allocation.measurement.network.layers:
        return (allocation.predicted / len(metric.parts),) * len(metric.parts)
    candidates, some = _chosen(allocation), samples.some(DRAWS)
    sums = []
    with workers(runtime.threads) as pool:
        for k in range(len(metric.parts)):
            part = metric.of_part(k)
            if not any(part.factors):  # not counted
                sums.append(0.0)
                continue
            network = aimed_at(allocation.measurement.network, part.outputs)
            batch = reverse_batch(network, observation, runtime, len(some))
            plan = ReversePlan(network, some, part, runtime, pool, batch, 0, draws=DRAWS)
            curves = with_memory(
                lambda size, plan=plan: first_order(  # type: ignore[misc]
                    replace(plan, batch=size), candidates, lambda done: None
                ),
                batch,
                observation,
            )
            found = [*(c.sum() for c in curves.weights), *(v.sum() for a in curves.activations for v in a.values())]
            sums.append(float(np.nansum(found)))
    total = sum(sums)
    return tuple(allocation.predicted * (s / total if total > 0 else 1 / len(sums)) for s in sums)


def _chosen(allocation: Allocation) -> Candidates:
    """The candidates that `allocation` picks, as if they were all there are."""
    measurement = allocation.measurement
    layers = (
        LayerCandidates(x.layer, x.mean, ((mixed(x.codes, bits),),))
        for x, bits in zip(measurement.layers, allocation.layer_bits, strict=True)
        if not x.layer.linear.axes  # of stored weights, no share is known
    )
    activations = (
        ActivationCandidates(x.activation, {bits: (x.quantizers[bits],)})
        for x, bits in zip(measurement.activations, allocation.activation_bits, strict=True)
    )
    return Candidates((0,), tuple(layers), tuple(activations))
