"""Copies the numbers of the committed CIFAR-100 study that the gallery shows into the package.

`python -m benchmarks.gallery` writes `src/matrigami/demo/cifar100.csv`, one row for each size and
structure: multiply-adds, and the train and test errors, means over seeds.
"""

import csv
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "docs" / "results" / "cifar100_published" / "results.csv"
TARGET = ROOT / "src" / "matrigami" / "demo" / "cifar100.csv"


def table() -> str:
    """The rows, as text."""
    runs = defaultdict(list)
    with SOURCE.open(newline="") as file:
        for row in csv.DictReader(file):
            runs[row["structure"], int(row["macs"])].append(row)
    lines = ["structure,macs,train_error,test_error"]
    for (structure, macs), rows in sorted(runs.items()):
        train, test = (
            sum(float(r[key]) for r in rows) / len(rows) for key in ("train_error", "test_error")
        )
        lines.append(f"{structure},{macs},{train:.2f},{test:.2f}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(table())
    print(f"{TARGET.relative_to(ROOT)}: {len(table().splitlines()) - 1} rows of {SOURCE.name}")
