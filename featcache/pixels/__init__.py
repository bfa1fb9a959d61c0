"""Pixels: decode the bytes of one image file into uint8 pixels of one size.

In: bytes, and the rules that decide the pixels (``images.PixelRules``). Out: arrays (S, S) or
(S, S, 3), equal to Pillow's bit for bit. Begin with ``images.load``, then ``views.render``.
"""
