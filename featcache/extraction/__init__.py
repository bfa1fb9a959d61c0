"""Extraction: samples -> a cache, resumable and updated in place.

In: a data set, a backbone and pixel rules. Out: one cache. Begin with ``extraction.extract``;
``verification.verify`` asks later whether the file is whole and true.
"""
