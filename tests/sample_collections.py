"""Collections of chest X-rays as they are downloaded, made small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sample_images import write_image

CHEXPERT = [
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
    "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices",
]  # fmt: skip
"""Columns of labels of ``write_chexpert``, in their order."""

NIH = ["--columns", "path=Image Index", "--columns", "target=Finding Labels",
       "--columns", "group=Patient ID", "--target-separator", "|"]  # fmt: skip
"""Options that read ``write_nih``."""


def write_nih(root: Path, num_images: int = 48, *, seed: int = 0) -> dict[str, set[str]]:
    """Write NIH ChestX-ray14, the last third of its images being those of test_list.txt.

    Returns:
        Name of each image -> its labels.
    """
    rng = np.random.default_rng(seed)
    view = "View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
    known = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender"
    lines = [f"{known},{view}"]
    labels: dict[str, set[str]] = {}
    for i in range(num_images):
        name = f"{i // 2:08}_{i % 2:03}.png"
        found = [label for label in ("Effusion", "Mass", "Nodule") if rng.random() < 0.4]
        labels[name] = {*found}
        write_image(root / f"images_{i // 16 + 1:03}/images/{name}", i, bright="Mass" in found)
        lines.append(
            f"{name},{'|'.join(found) or 'No Finding'},{i % 2},{i // 2},058,"
            "M,PA,2682,2749,0.143,0.143,"
        )
    (root / "Data_Entry_2017.csv").write_text("\n".join(lines) + "\n")
    names, start = [*labels], num_images * 2 // 3
    (root / "train_val_list.txt").write_text("\n".join(names[:start]) + "\n")
    (root / "test_list.txt").write_text("\n".join(names[start:]))
    return labels


def write_chexpert(root: Path, sizes: dict[str, int] | None = None) -> dict[str, list[list[str]]]:
    """Write CheXpert-v1.0-small: train.csv has 1.0, 0.0, -1.0 and empty cells, valid.csv 1 and 0.

    Returns:
        Split -> the cells of the labels of each image, in the order of their paths.
    """
    rng, cells = np.random.default_rng(1), dict[str, list[list[str]]]()
    for split, number in (sizes or {"train": 48, "valid": 16}).items():
        lines = ["Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(CHEXPERT)]
        words = ["1.0", "0.0", "-1.0", ""] if split == "train" else ["1.0", "0.0"]
        rows = cells[split] = []
        for i in range(number):
            path = f"{split}/patient{i // 2:05}/study1/view{i % 2 + 1}_frontal.jpg"
            row = [str(rng.choice(words)) for _ in CHEXPERT[1:]]
            if i % 4 == 0:  # healthy, with or without devices
                row[:-1] = [cell if cell in {"", "0.0"} else words[-1] for cell in row[:-1]]
            is_clear = all(cell in {"", "0.0"} for cell in row[:-1])
            rows.append(["1.0" if is_clear else words[-1], *row])
            write_image(root / path, 1000 + i, bright=row[0] == "1.0")
            lines.append(f"{root.name}/{path},Male,{50 + i},Frontal,AP,{','.join(rows[-1])}")
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return cells
