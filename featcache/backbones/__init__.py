"""Backbones: a name -> a frozen network -> a fast forward pass that was checked against it.

In: a backbone's name and weights, then batches of pixels. Out: features (B, D). Begin with
``backbone.build_backbone``, then ``engine.build_engine``.
"""
