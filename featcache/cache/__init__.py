"""Cache: the HDF5 file of features: write, open, check, repair, rearrange.

In: features, targets and paths. Out: a ``Cache`` whose splits give them back. Begin with
``reading.open_cache``; ``writing.write_cache`` writes features made elsewhere, ``selection.select``
makes a cache from others, ``converting/`` goes to and from other formats. ``by_url`` lets all verbs
take caches and runs by URL. FORMAT.md describes the file.
"""
