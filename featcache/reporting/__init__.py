"""Reporting: a run as one page that can be handed on.

In: a run and the caches it was trained on. Out: one HTML file that needs nothing else. Begin with
``report.report``: ``facts`` gathers and measures, ``charts`` draws, ``page`` writes the HTML.
"""
