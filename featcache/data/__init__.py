"""Data: find the images of a data set, with their classes, splits and groups.

In: folders, zip files, tars, Parquet files and CSVs. Out: an ``ImageDataset`` of ``Samples``, or a
new split of them. Begin with ``dataset.scan``; ``companions`` finds masks among the images,
``tables`` reads CSVs, ``objects`` sends and fetches
whole objects of stores, ``tars`` and ``parquet`` read files of many images, ``groups`` names
patients, and ``splitting.split`` makes train, valid and test.
"""
