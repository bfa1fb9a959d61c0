"""Heads: features -> trained heads -> a run folder.

In: rows of a cache. Out: weights, history and configuration. Begin with ``training.train``, then
``fit.fit_heads``, which runs the passes that ``passes`` plans (``one_pass.fit_pass``); on a CPU go
on with ``group`` and ``compiled.training_step``, on a GPU with ``stack``. No image and no network
is needed here.
"""
