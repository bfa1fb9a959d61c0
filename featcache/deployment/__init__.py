"""Deployment: a run -> something that classifies images elsewhere.

In: a run folder, and images or a cache. Out: predictions, explanations, or exported weights. Begin
with ``classifier.load_classifier``.
"""
