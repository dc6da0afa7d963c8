"""Trials on the emitted model: bit swaps, scale refit, clipping, re-rounding.

An Allocation in, a better one out, judged by measured distortion.
Imports from emission and what is above it.
"""
