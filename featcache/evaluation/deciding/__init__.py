"""Deciding: the threshold of a positive class, how it was chosen, and what it does.

In: a run, or the folder of a cross-validation. Out: ``RUN/decision.json``, and a ``DecideSummary``.
Begin with ``decision.decide``; ``decision_file.load_decisions`` reads thresholds to apply them.
"""
