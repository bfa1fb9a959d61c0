"""Extraction by several processes: what a worker does, who gives out the work, where they run."""
