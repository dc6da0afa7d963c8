"""What the emitted file does on samples that nothing else has seen, and whether all kernels agree.

An Emission in, a Verification out, or VerificationError.
Imports from refinement and what is above it.
"""
