"""Sweeps: many head configurations, trained together and ranked honestly.

In: a cache and a search space. Out: a run with its table of trials. Begin with ``sweeping.sweep``.
"""
