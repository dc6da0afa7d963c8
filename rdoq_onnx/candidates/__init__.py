"""Every channel and activation quantized at every width, exactly as it would be emitted.

Takes moments and sensitivities of the layers, returns integers and scales.
Imports from gradients and what is above it.
"""
