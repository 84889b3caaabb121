"""What was done with the layers of a model, for a person and for a program."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from matrigami.compress._methods import Method, described
from matrigami.compress._outcome import Outcome

SHOWN = 4
"""Names of matrices that are printed where they were not touched."""


@dataclass(frozen=True)
class LayerReport:
    """What was done with one layer.

    Attributes:
        name: The layer.
        rows: Vectors in its calibration; 0 if none has reached it.
        rejected: Vectors that were left out because they were not finite.
        damping: Of the moments, relative to their mean diagonal.
        loss: Relative loss of the layer on held-out vectors.
        simple: The same of the simple method: rounding to nearest, removal by magnitude, or the
            projection without a metric.
        bits: Stored bits of a weight, scales counted.
        note: What a reader should know, or nothing.
        method: What was done.
        macs: Multiply-adds for one input vector, zeros not counted.
    """

    name: str
    rows: int
    rejected: int
    damping: float
    loss: float
    simple: float
    bits: float
    note: str = ""
    method: str = ""
    macs: int = 0

    @classmethod
    def of(
        cls, name: str, method: Method, made: Outcome, weights: int, counts: tuple[int, int]
    ) -> "LayerReport":
        """The report on an outcome for so many weights, after so many vectors, good and bad."""
        bits = 8 * made.nbytes / max(weights, 1)
        loss, simple = (max(part, 0.0) for part in (made.loss, made.simple))  # rounding goes below
        told = (made.damping, loss, simple, bits, made.note, described(method), made.macs)
        return cls(name, *counts, *told)


@dataclass
class Report:
    """What was done with a model, layer by layer.

    Attributes:
        layers: One entry for each.
        values: The compressed matrices, by the names of the layers.
        left: Matrices that were not touched, each with its share of all numbers of the model.
    """

    layers: list[LayerReport] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """The layers as a JSON list."""
        return json.dumps([asdict(layer) for layer in self.layers], indent=1)

    def __str__(self) -> str:
        """A table."""
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':{width}}  {'rows':>8}  {'loss':>9}  {'simple':>9}  {'bits':>5}  note"]
        lines += [
            f"{r.name:{width}}  {r.rows:>8}  {r.loss:>9.2e}  {r.simple:>9.2e}  {r.bits:>5.2f}  "
            f"{r.note}"
            for r in self.layers
        ]
        if self.left:
            names = sorted(self.left, key=self.left.__getitem__, reverse=True)
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            share = 100 * sum(self.left.values())
            lines.append(f"left as they are, {share:.0f} %: {', '.join(names[:SHOWN])}{more}")
        return "\n".join(line.rstrip() for line in lines)
