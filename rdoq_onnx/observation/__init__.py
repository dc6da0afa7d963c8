"""What the float network does on the samples: ranges, sizes, power, how samples batch.

A Network and Samples in, an Observation out; equalization evens channel ranges out first.
Imports from analysis and what is above it.
"""
