"""Samples from any source: files, folders, images, feeds, a function of the user, or random ones.

A source and the inputs of a model in, Samples out: rows by index, read when a batch is fed.
Imports from model.
"""
