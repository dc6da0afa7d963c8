"""Rate-distortion curves: δ of every channel and activation at every width, anchored to exact runs.

A Network and Samples in, a Measurement out, kept in a checkpoint as it grows.
Imports from probing and what is above it.
"""
