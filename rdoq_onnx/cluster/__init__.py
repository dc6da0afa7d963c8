"""Other processes that compute for a run, on this machine or on a Ray cluster.

A Sum and indices of its blocks in, their sums out, as system/summation.py computes them here.
Imports from model and system.
"""
