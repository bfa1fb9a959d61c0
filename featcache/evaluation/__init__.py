"""Evaluation: a run or a cache -> facts and figures.

In: a run folder and a cache. Out: metrics, mistakes, a confusion matrix. Begin with
``evaluation.evaluate``; ``info.info`` lists what a cache or a run holds, ``auditing/`` checks a
data set, ``deciding/`` chooses a threshold.
"""
