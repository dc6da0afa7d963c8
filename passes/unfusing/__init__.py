"""Operators that others are fused into, written out again as the standard operators that they stand for.

unfuse is the pass; block is what its rules see of a node and add to the graph; the rules are in the other modules.
Imports from `passes` and `rdoq_onnx.model`.
"""
