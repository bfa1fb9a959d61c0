"""Data: find the images of a data set, with their classes, splits and groups.

In: folders, zip files and CSVs. Out: an ``ImageDataset`` of ``Sample``s, or a new split of them.
Begin with ``dataset.scan``; ``splitting.split`` makes train, valid and test.
"""
