"""Reverse passes over the modified network: g = Jᵀ v at all of its Adds at once (Eq. 3 to 5).

Takes a Network, returns batches of g, or sums over g computed inside the graph.
Imports from observation and what is above it.
"""
