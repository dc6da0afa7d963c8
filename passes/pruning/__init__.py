"""Remove channels of 0 bits and fold them into the biases after them.

remove_channels contains the pass; the other modules are its building blocks.
Imports from `passes` and `rdoq_onnx.model`.
"""
