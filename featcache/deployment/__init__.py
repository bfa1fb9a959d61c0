"""Deployment: a run -> something that classifies images elsewhere.

In: a run folder, and images or a cache. Out: predictions, explanations, exported networks, a
server. Begin with ``classifier.load_classifier``; ``exporting/`` and ``server/`` stand on it.
"""
