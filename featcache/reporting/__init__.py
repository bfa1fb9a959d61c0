"""Reporting: a run as one page that can be handed on, or in a tracker of experiments.

In: a run and the caches it was trained on. Out: one HTML file that needs nothing else. Begin with
``report.report``: ``facts`` gathers and measures, ``charts`` draws, ``page`` writes the HTML.
``tracking.log`` replays a finished folder: ``tracked`` says what there is, and a module for each
tracker how it gets there.
"""
