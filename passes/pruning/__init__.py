"""Channels of 0 bits, folded into the biases behind them and removed.

remove_channels is the pass; the others are what it is made of.
Imports from `passes` and `rdoq_onnx.model`.
"""
