"""The 4-bit file that ONNX Runtime's own quantizer makes of a model, to compare with.

It runs in a process of its own, since its module sets up the logging of the whole process that imports it.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import onnx

from rdoq_onnx.errors import RdoqError
from rdoq_onnx.system import io

_LIMIT = 600  # seconds
# Blocks of 32 weights, nearly its smallest. accuracy_level 4: products on integers, as those of --storage nbits.
_QUANTIZE = """
import sys
import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
model = onnx.load(sys.argv[1])
quantizer = MatMulNBitsQuantizer(model, bits=4, block_size=32, is_symmetric=True, accuracy_level=4)
quantizer.process()
onnx.save(quantizer.model.model, sys.argv[2])
"""


def four_bits(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """Round the matrix products of `model` to nearest at 4 bits; None if the quantizer cannot, or lacks onnx-ir."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "model.onnx"), Path(folder, "four_bits.onnx")
        io.write_model(model, source)
        try:
            command = [sys.executable, "-c", _QUANTIZE, str(source), str(target)]
            subprocess.run(command, capture_output=True, timeout=_LIMIT, check=True)
            return io.read_model(target)
        except (subprocess.SubprocessError, OSError, RdoqError):
            return None
