"""Estimate: the time, memory and scratch space of a run, from sizes and a few timed computations.

Takes a network with its sizes, and gives seconds for each step and bytes. Reads no detached weights.
Imports the wings that a run measures with, for their own constants.
"""
