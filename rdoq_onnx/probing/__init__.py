"""Exact distortion of one perturbation at a time (Eq. 7 and 8), by running the part of the network behind it.

Takes Candidates, returns Distortions.
Imports from candidates and what is above it.
"""
