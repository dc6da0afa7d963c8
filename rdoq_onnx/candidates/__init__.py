"""Every channel and every activation at every width, just as it would be emitted.

Moments and sensitivities of the layers in, integers and scales out.
Imports from gradients and what is above it.
"""
