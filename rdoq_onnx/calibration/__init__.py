"""Calibration samples from any source: files, folders, images, feeds, a user function, or random data.

A source and the model's inputs in, Samples out: rows by index, read when a batch is fed.
Imports from model.
"""
