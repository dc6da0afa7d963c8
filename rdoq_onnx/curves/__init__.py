"""Rate-distortion curves: δ of every channel and activation at every width, anchored to exact runs.

Takes a Network and Samples, returns a Measurement; a checkpoint keeps finished steps.
Imports from probing and what is above it.
"""
