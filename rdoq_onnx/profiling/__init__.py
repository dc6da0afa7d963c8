"""What ONNX Runtime takes here for each layer, in the forms that differ there.

A Measurement and samples in, a Cost with the rows of all layers out.
Imports from emission and what is above it.
"""
