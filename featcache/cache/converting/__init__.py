"""Converting: a cache -> a file that other tools read, and such a file -> a cache.

In: a cache, or a file of rows (npz, safetensors, h5ad, CSV, Parquet). Out: the other of the two.
Begin with ``conversion.convert``; ``rows`` describes the table that all formats have in common.
"""
