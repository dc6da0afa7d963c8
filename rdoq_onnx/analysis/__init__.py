"""What there is to quantize in a normalized model, and why the rest stays in float.

A model and the settings in, a Network out: layers, activations, reasons.
Imports from system and what is above it.
"""
