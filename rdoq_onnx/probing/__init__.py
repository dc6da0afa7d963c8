"""Exact distortion of one perturbation at a time (Eq. 7 and 8), by running what lies behind it.

Candidates in, Distortions out.
Imports from candidates and what is above it.
"""
