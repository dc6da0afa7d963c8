"""Reverse passes over the modified network: g = Jᵀ v at every Add of it at once (Eq. 3 to 5).

A Network in, batches of g out, or sums of them made within the graph.
Imports from observation and what is above it.
"""
