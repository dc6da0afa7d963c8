"""Make a weight-only file with another tool; bench_weight_only.py runs this in the environment of the peers.

    PYTHON weight_only_peers.py MODEL OUTPUT --tool rtn|gptq|gptq_mended|awq|awq_mended|tables --bits 4 --block 32
                                [--symmetric] [--calibration NPZ --samples N]
    PYTHON weight_only_peers.py --versions

The environment needs onnxruntime, onnx-ir, onnx-neural-compressor and prettytable, which the last one imports but does
not require. `rtn` is round to nearest by onnxruntime.quantization, `gptq` and `awq` are those of
onnx-neural-compressor, each by its MatMulNBitsQuantizer at its defaults. `tables` rounds the tables of Gather by
ONNX Runtime's quantizer, also in a file of the others, which leave them in float.

Faults of onnx-neural-compressor 1.0 that are mended from outside:

- `gptq` moves no error from a row to the next ones: it takes columns of an upper triangular factor, which are zero
  there, and so returns round to nearest. `gptq_mended` has the lower factor in its place.
- `awq` judges its scales and clips on differences of unsigned integers that wrap around, with one scale for the whole
  tensor. `awq_mended` takes signed ones, and the blocks of the file.
- For layers with an odd number of blocks the tool packs zero points across channels, which ONNX Runtime 1.32 refuses to
  load. They are packed anew in all its files.
"""

import argparse
import inspect
import json
import logging
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

PACKAGES = ("onnxruntime", "onnx-neural-compressor", "onnx", "numpy")
OPSET = 21  # the first with four-bit integers


def layers_to_nearest(model: onnx.ModelProto, args: argparse.Namespace) -> onnx.ModelProto:
    return to_nearest(model, args, "MatMul")


def tables_to_nearest(model: onnx.ModelProto, args: argparse.Namespace) -> onnx.ModelProto:
    """Round the tables of Gather, after a conversion: the quantizer sets opset 21 and leaves the nodes as they are."""
    return to_nearest(onnx.version_converter.convert_version(model, OPSET), args, "Gather")


def to_nearest(model: onnx.ModelProto, args: argparse.Namespace, operator: str) -> onnx.ModelProto:
    config = DefaultWeightOnlyQuantConfig(
        block_size=args.block, is_symmetric=args.symmetric, bits=args.bits, op_types_to_quantize=(operator,)
    )
    quantizer = MatMulNBitsQuantizer(model, algo_config=config)
    quantizer.process()
    return quantizer.model.model


def layers_by_samples(model: onnx.ModelProto, args: argparse.Namespace) -> onnx.ModelProto:
    """Round by GPTQ or AWQ."""
    from onnx_neural_compressor import data_reader
    from onnx_neural_compressor.quantization import matmul_nbits_quantizer as compressor

    class Reader(data_reader.CalibrationDataReader):
        """The samples one at a time."""

        def __init__(self) -> None:
            self.samples = samples(args.calibration, args.samples)
            self.rewind()

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.remaining, None)

        def rewind(self) -> None:
            self.remaining = iter(self.samples)

    kind = compressor.AWQWeightOnlyQuantConfig if "awq" in args.tool else compressor.GPTQWeightOnlyQuantConfig
    quantizer = compressor.MatMulNBitsQuantizer(
        model,
        block_size=args.block,
        is_symmetric=args.symmetric,
        algo_config=kind(calibration_data_reader=Reader()),
        n_bits=args.bits,
    )
    quantizer.process()
    return repacked(quantizer.model)


def repacked(model: onnx.ModelProto) -> onnx.ModelProto:
    """Pack the zero points of MatMulNBits channel by channel, [N, ⌈blocks / 2⌉] bytes, the first in the low nibble."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits" or len(node.input) < 4:
            continue
        zeros, channels = tensors[node.input[3]], tensors[node.input[2]].dims[0]
        blocks = tensors[node.input[2]].dims[1]
        packed = np.frombuffer(zeros.raw_data, np.uint8)
        nibbles = np.stack([packed & 15, packed >> 4], axis=1).ravel()[: channels * blocks].reshape(channels, blocks)
        even = np.pad(nibbles, ((0, 0), (0, blocks % 2)))
        zeros.CopyFrom(onnx.numpy_helper.from_array((even[:, ::2] | even[:, 1::2] << 4).ravel(), zeros.name))
    return model


def layers_by_mended_gptq(model: onnx.ModelProto, args: argparse.Namespace) -> onnx.ModelProto:
    """Round by GPTQ, with numpy's factor transposed, since the tool transposes it once too often."""
    lower = np.linalg.cholesky
    np.linalg.cholesky = lambda matrix: lower(matrix).T
    try:
        return layers_by_samples(model, args)
    finally:
        np.linalg.cholesky = lower


def layers_by_mended_awq(model: onnx.ModelProto, args: argparse.Namespace) -> onnx.ModelProto:
    """Round by AWQ, with the weights of its search quantized in blocks along the inputs, and signed differences."""
    from onnx_neural_compressor.algorithms.weight_only import awq

    quantize = awq.quant_utils.quantize_data

    def decoded(data: np.ndarray, kind: str, symmetric: bool, ratio: float = 1.0, axis: int = 1) -> np.ndarray:
        _, _, zeros, scales, integers = quantize(data, kind, symmetric, ratio=ratio, axis=1)
        return scales * (integers.astype(np.float32) - zeros.astype(np.float32))

    awq.quant_utils.qdq_data = decoded
    source = inspect.getsource(awq._apply_awq_scale).replace("weight.reshape((-1,", "weight.T.reshape((-1,")
    exec(source.replace(").reshape(weight.shape)", ").reshape(weight.T.shape).T"), vars(awq))
    return layers_by_samples(model, args)


def samples(path: Path, limit: int) -> list[dict[str, np.ndarray]]:
    """Load at most `limit` evenly spaced samples, each a batch of one."""
    with np.load(path) as data:
        arrays = dict(data)
    count = len(next(iter(arrays.values())))
    rows = np.linspace(0, count - 1, min(limit, count)).astype(int)
    return [{name: values[row : row + 1] for name, values in arrays.items()} for row in rows]


TOOLS = {
    "rtn": layers_to_nearest,
    "gptq": layers_by_samples,
    "gptq_mended": layers_by_mended_gptq,
    "awq": layers_by_samples,
    "awq_mended": layers_by_mended_awq,
    "tables": tables_to_nearest,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--tool", choices=list(TOOLS))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--versions", action="store_true", help="print the versions of the packages as JSON")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.versions:
        print(json.dumps({name: version(name) for name in PACKAGES}))  # noqa: T201  # read by bench_weight_only.py
        return
    logging.disable(logging.WARNING)
    onnx.save(TOOLS[args.tool](onnx.load(args.model), args), args.output)


if __name__ == "__main__":
    main()
