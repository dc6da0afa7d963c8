"""What each node costs at each pair of widths: presets, files, and templates of these.

A Network, the sizes of its tensors and a Cost in, a table for each node out.
Imports from curves and what is above it.
"""
