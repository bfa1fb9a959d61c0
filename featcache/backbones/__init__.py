"""Backbones: build a frozen network by name, and a fast forward pass checked against it.

In: a backbone's name and weights, then batches of pixels. Out: features (B, D). Begin with
``backbone.build_backbone``, then ``engine.build_engine``.
"""
