"""Trials on the emitted model: bit swaps, scale and bias fits, clipping, rounding once more.

An Allocation in, a better one out, judged by measured distortion.
Imports from emission and what is above it.
"""
