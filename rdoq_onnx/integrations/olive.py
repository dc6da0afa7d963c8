"""A pass of Microsoft Olive: `"type": "RdoqOnnx"` in a workflow, with the package configuration beside this module.

Only Olive imports this module. `package_config()` writes what `olive run --package-config` reads.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from olive.common.config_utils import validate_config
from olive.data.config import DataConfig
from olive.hardware import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from rdoq_onnx.api import quantize

NAME = "RdoqOnnx"
_ANY = ["*"]


def package_config(path: str | Path) -> None:
    """Write Olive's own package configuration with this pass added, for `olive run --package-config PATH`."""
    config = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text())
    config["passes"][NAME] = {
        "module_path": f"{__name__}.{NAME}",
        "supported_providers": _ANY,
        "supported_accelerators": _ANY,
        "supported_precisions": _ANY,
        "supported_algorithms": [],
        "supported_quantization_encodings": [],
    }
    Path(path).write_text(json.dumps(config, indent=2))


class RdoqOnnx(Pass):  # type: ignore[misc]
    """Quantize an ONNX model with a bit width for each channel and each activation."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        del accelerator_spec

        def parameter(type_: Any, text: str, default: Any = None) -> PassConfigParam:
            return PassConfigParam(type_=type_, default_value=default, description=text)

        return {
            "bits": parameter(float, "Average bits of weights and activations.", 8.0),
            "weight_bits": parameter(float, "The same for weights only."),
            "activation_bits": parameter(str, 'The same for activations only, or "none" for float.'),
            "calibration": parameter(str, 'File, folder or "module:function" with samples.'),
            "data_config": parameter(DataConfig | dict, "Olive's data configuration, in place of `calibration`."),
            "options": parameter(dict, "Further options of rdoq_onnx.quantize, by name."),
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        sides = {"weight_bits": config.weight_bits, "activation_bits": config.activation_bits}
        options = {name: value for name, value in sides.items() if value is not None} | (config.options or {})
        samples = config.calibration if config.data_config is None else _Feeds(model, config.data_config)
        result = quantize(model.model_path, samples, bits=config.bits, **options)
        path = resolve_onnx_path(output_model_path)
        result.save(path)
        return ONNXModelHandler(path)


class _Feeds:
    """The feeds of Olive's data loader, without the labels."""

    def __init__(self, model: ONNXModelHandler, data_config: Any) -> None:
        container = validate_config(data_config, DataConfig).to_data_container()
        self._make: Callable[[], Any] = container.create_dataloader
        self._names = set(model.io_config["input_names"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for item in self._make():
            values = item[0] if isinstance(item, tuple | list) else item
            yield {name: value for name, value in values.items() if name in self._names}
