"""Rewrites that bring any model into the form that the analysis reads.

Run in the order of `analysis.normalization.NORMALIZE`.
Imports from `passes` and `rdoq_onnx.model`.
"""
