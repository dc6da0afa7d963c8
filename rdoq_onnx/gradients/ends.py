"""What reverse passes begin at: the measured tensors, and of rows of logits z their φ(z) = √(2 softmax(z)).

The squared error of φ is the divergence of the rows to second order (observation/distortion.py), so that signs v over
φ give E_v[(vᵀJΔ)²] = KL as they give ‖JΔ‖² over z. √p is computed as exp(½ log p), whose derivative stays finite at 0.
"""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.observation.distortion import Metric


def ends_of(model: onnx.ModelProto, metric: Metric) -> tuple[onnx.ModelProto, dict[int, str]]:
    """Return `model` with the tensors that seeds belong to, and their names by the index of the measured tensor."""
    counted = {k: name for k, (name, w) in enumerate(zip(metric.outputs, metric.factors, strict=True)) if w}
    axes = {k: axis for k in counted if (axis := metric.axes[k]) is not None}
    if not axes:
        return model, counted
    ends = {k: f"{name}/root of p" for k, name in counted.items() if k in axes}
    extended = with_outputs(model, [*counted.values()])
    extended.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "half of log p"))
    extended.graph.initializer.append(numpy_helper.from_array(np.array(2**0.5, np.float32), "root of 2"))
    for k, end in ends.items():
        extended.graph.node.extend(
            [
                helper.make_node("LogSoftmax", [counted[k]], [f"{end}/log"], axis=axes[k]),
                helper.make_node("Mul", [f"{end}/log", "half of log p"], [f"{end}/half"]),
                helper.make_node("Exp", [f"{end}/half"], [f"{end}/exp"]),
                helper.make_node("Mul", [f"{end}/exp", "root of 2"], [end]),
            ]
        )
    return extended, {**counted, **ends}
