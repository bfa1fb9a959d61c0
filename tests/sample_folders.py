"""Folders of files that are called images: their content is text, and rarely read."""

from featcache.data.dataset import UNLABELLED

PATIENT = r"^(p\d+)_"
"""``--group-by`` for files called p17_0.png: of patient p17."""


def write_files(root, contents):
    """Write {path: text} below ``root``; where the text is None it is the path itself."""
    for path, text in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes((text or path).encode())
    return root


def plant(root, *paths):
    """Make files (their content is their own path) and, for names ending in /, folders."""
    for path in paths:
        if path.endswith("/"):
            (root / path).mkdir(parents=True, exist_ok=True)
        else:
            write_files(root, {path: None})
    return root


def plain(root, **counts):
    """Make class folders of so many images: ``plain(root, covid=20, normal=40)``."""
    return plant(
        root, *(f"{name}/{n:03}.png" for name, many in counts.items() for n in range(many))
    )


def table(dataset):
    """Return (split, class, path) of every sample."""
    return [
        (s.split, dataset.classes[s.target] if s.target != UNLABELLED else None, s.path)
        for s in dataset.samples
    ]


SPLIT_TREE = (
    "train/covid/a.png", "train/covid/b.PNG", "train/normal/c.jpg",
    "val/covid/d.jpeg", "val/normal/e.tif", "test/covid/f.bmp", "test/normal/g.webp",
)  # fmt: skip
SPLIT_TABLE = [
    ("train", "covid", "train/covid/a.png"),
    ("train", "covid", "train/covid/b.PNG"),
    ("train", "normal", "train/normal/c.jpg"),
    ("valid", "covid", "val/covid/d.jpeg"),
    ("valid", "normal", "val/normal/e.tif"),
    ("test", "covid", "test/covid/f.bmp"),
    ("test", "normal", "test/normal/g.webp"),
]


def sheet(tmp_path, text, *paths, name="table.csv", encoding="utf-8"):
    """Write a CSV beside four images, or beside ``paths``."""
    plant(tmp_path, *(paths or ("i/1.png", "i/2.png", "i/3.png", "i/4.png")))
    (tmp_path / name).write_text(text, encoding=encoding, newline="")
    return tmp_path / name
