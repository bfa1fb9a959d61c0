"""Metrics: pure functions of probabilities and targets.

In: arrays. Out: numbers. Begin with ``scores.compute_metrics``.
"""
