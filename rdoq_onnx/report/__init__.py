"""Reports of a run: table, JSON, HTML page, hints.

The outcome of a run in, text out.
Imports from verification and what is above it.
"""
