"""Run the command line: `python -m rdoq_onnx`."""

from rdoq_onnx.cli import main

main()
