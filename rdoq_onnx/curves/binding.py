"""What a measurement belongs to: hashes of the model and the samples, and the settings that curves depend on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from rdoq_onnx.model.external import Place, bytes_at
from rdoq_onnx.system.encoding import model_parts
from rdoq_onnx.version import __version__

VERSION = 14  # of the format of curves files and scratch folders


@dataclass(frozen=True)
class Binding:
    """Identity of a measurement: hashes of the model and the samples, and the settings that it depends on."""

    model: str
    samples: str
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, model: onnx.ModelProto, samples: str, settings: Mapping[str, Any]) -> "Binding":
        state, tensors = hashlib.sha256(), [None, *model.graph.initializer]
        for tensor, part in zip(tensors, model_parts(model), strict=True):
            where = None if tensor is None else Place.of(tensor)
            # What a file holds counts, not where the file is.
            state.update(hashlib.sha256(part if where is None else bytes_at(where).data).digest())
        return cls(state.hexdigest(), samples, json.loads(json.dumps(settings)))

    @property
    def identity(self) -> str:
        """A hash of all."""
        text = json.dumps([VERSION, __version__, self.model, self.samples, self.settings])
        return hashlib.sha256(text.encode()).hexdigest()
