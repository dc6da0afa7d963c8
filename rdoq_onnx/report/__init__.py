"""The figures of a run: table, JSON, page of plots, advice.

The outcome of a run in, text out.
Imports from verification and what is above it.
"""
