"""Compiled: the training step of a head, by small kernels that Numba compiles.

In: arrays of rows and parameters. Out: the same arrays, one step further.
"""
