"""The widths of least predicted distortion within the budgets, by Lagrangian relaxation.

A Measurement and budgets in, an Allocation out.
Imports from curves and what is above it.
"""
