"""Exporting: a run -> one network that needs no featcache.

In: a run folder. Out: a state dict, an ONNX file, or a folder with a script, golden examples and a
model card. Begin with ``export.export``; ``delivery`` writes ONNX and folders, ``graph`` builds the
network, ``parity`` compares it with the run. ``predict_script`` becomes ``predict.py``.
"""
