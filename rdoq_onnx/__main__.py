"""Run the command line: `rdoq-onnx`, or `python -m rdoq_onnx`."""

import sys

from rdoq_onnx.version import __version__


def main() -> None:
    """Print the version without loading anything else; leave all other arguments to `cli`."""
    if sys.argv[1:] == ["--version"]:
        sys.stdout.write(f"{__version__}\n")
        return
    from rdoq_onnx.cli import main as run  # here: it loads ONNX Runtime

    run()


if __name__ == "__main__":
    main()
