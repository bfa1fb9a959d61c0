"""Auditing: is a data set sound? Copies, wrong labels, shortcuts, outliers, sources.

In: a cache, and its images where they are given. Out: an ``Audit``: facts, lines and a verdict.
Begin with ``audit.audit``; each part is a module. ``copies`` and ``pictures`` find copies,
``folds`` trains the heads that ``labels``, ``shortcuts``, ``sources`` and ``blackout`` compare.
"""
