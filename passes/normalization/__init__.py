"""Rewrites that normalize any model to the form that the analysis reads.

They run in the order of `analysis.normalization.NORMALIZE`.
Imports from `passes` and `rdoq_onnx.model`.
"""
