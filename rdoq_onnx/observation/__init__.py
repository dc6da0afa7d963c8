"""Float forward passes over the samples: ranges, sizes, output power and batching.

Takes a Network and Samples, returns an Observation; before that, equalization evens out channel ranges.
Imports from analysis and what is above it.
"""
