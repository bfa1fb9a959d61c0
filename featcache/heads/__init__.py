"""Heads: features -> trained heads -> a run folder.

In: rows of a cache. Out: weights, history and configuration. Begin with ``training.train``, then
``fit.fit_heads``; no image and no network is needed here.
"""
