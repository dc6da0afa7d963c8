"""Find what can be quantized in a normalized model, and why the rest stays in float.

A model and the settings in, a Network out: layers, activations, reasons.
Imports from system and the wings above it.
"""
