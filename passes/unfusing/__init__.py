"""Operators that others are fused into, written out again: `unfuse` is the pass, the rules are in the other modules.

Imports from `passes` and `rdoq_onnx.model`.
"""
