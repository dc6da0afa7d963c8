"""Joint tuning of everything quantized by gradients of the output distortion.

An Allocation in, one of the same widths with other integers, scales, biases and quantizers out.
Imports from emission and what is above it.
"""
