"""Which layers ONNX Runtime's integer kernels would slow down, as predicted from sizes alone.

A Network and the sizes of its tensors in, the activations that layers read in float out.
Imports from observation and what is above it.
"""
