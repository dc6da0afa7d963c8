"""Weights of quantized models at their true size, decoded by standard operators.

pack_weights and pack_vectors are the passes; the others are what these are made of.
Imports from `passes` and `rdoq_onnx.model`.
"""
