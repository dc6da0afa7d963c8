"""Tools in which people already work run this one.

Takes what those tools give: models, settings, data loaders. Returns what they read.
Imports `api` alone, and the tool itself; only that tool imports what is here.
"""
