"""The quantized model: Q/DQ nodes, packed weights, biases, channels of 0 bits folded away.

An Allocation in, an Emission out.
Imports from allocation and what is above it.
"""
