"""Open the scratch folder and the checkpoint of a run."""

from pathlib import Path

import onnx

from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.config import Config
from rdoq_onnx.curves.binding import Binding
from rdoq_onnx.curves.checkpoint import Store
from rdoq_onnx.curves.shards import reject_part, share
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.system.curve_files import CurveFiles
from rdoq_onnx.system.scratch import Scratch

Curves = str | Path | CurveFiles | None


def scratch_for(config: Config, curves: Curves) -> Scratch:
    """Return the scratch folder of a run, beside the file `curves` if given. Raises ConfigError."""
    if config.scratch is not None and not Path(config.scratch).is_dir():
        raise ConfigError(f"--scratch {config.scratch}: is not a folder; create it first")
    return Scratch(None if config.scratch is None else Path(config.scratch), CurveFiles.of(curves).path)


def store_for(
    model: onnx.ModelProto, samples: Samples, seen: int, config: Config, curves: Curves, scratch: Scratch
) -> Store:
    """Open the store of the normalized `model` measured on `seen` of the `samples`, in the file `curves` if given."""
    files = CurveFiles.of(curves)
    if files == CurveFiles():
        return Store(scratch=scratch)
    data = f"{samples.digest}, {seen} of {len(samples)}"
    binding = Binding.of(model, data, config.measuring())
    store = Store(scratch=scratch) if files.path is None else Store.open(files.path, binding, scratch)
    if files.shard is not None or files.parts:
        share(store, files, binding)
    elif files.path is not None:
        reject_part(store, files.path)
    return store
