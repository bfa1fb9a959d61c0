"""Extraction: samples -> a cache, resumable and updated in place.

In: a data set, a backbone and pixel rules. Out: one cache. Begin with ``extraction.extract``, which
goes three steps: ``plan`` (what is known), ``work`` (run the rest), ``finish`` (write the cache).
All that is known of an image stands in the ``ledger``. ``verification.verify`` asks later whether
the file is whole and true.
"""
