"""Cache: the HDF5 file of features: write, open, check, mend, rearrange.

In: features, targets and paths. Out: a ``Cache`` whose splits give them back. Begin with
``reading.open_cache``; ``writing.write_cache`` makes one, ``selection.select`` makes one of others.
"""
