"""Checks of the emitted file on held-out samples: its distortion, and whether all kernels agree.

An Emission in, a Verification out, or VerificationError.
Imports from refinement and what is above it.
"""
