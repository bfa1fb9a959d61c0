"""Evaluation: a run or a cache -> facts and figures.

In: a run folder and a cache. Out: metrics, mistakes, a confusion matrix. Begin with
``evaluation.evaluate``; ``decision.decide`` chooses a threshold, ``info.info`` lists what a cache
or a run holds.
"""
