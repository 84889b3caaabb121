"""One training run, fully resolved: its identity, folder and record derive from this."""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Layers = Literal["all", "hidden"]
"""Which layers carry the structure: all but the head, or only those of the residual blocks."""

Mixture = Literal["layer", "network"]
"""What an expert of a mixture is."""

LARGEST_SEED = 2**62
"""A generator takes 64 bits, and each run has two generators."""

LARGEST_COUNT = 2**30
"""What a size may be: products of two are whole numbers of 64 bits."""

DEEPEST = 2**12
"""Blocks, each of which is a module of its own."""

NOT_IDENTITY = frozenset({"checkpoint_seconds", "folder"})
"""Fields that do not change the result of a run."""

NOTED = ("folder", "data_hash", "model_hash")
"""Fields that are filled in where a study file is read: where its own sources are, and what."""

ADDED = frozenset(
    {
        "optimizer",
        "context",
        "vocabulary",
        "side",
        "targets",
        "data_hash",
        "model_hash",
        "experts",
        "active",
        "mixture",
        "score",
    }
)
"""Fields that came later: left out at their default, so that older runs keep their identity."""

OF_DATA = (
    *("augment", "shuffle_pixels", "mixup", "label_smoothing"),
    *("samples_per_epoch", "context", "vocabulary", "side"),
)
"""Fields that mean something for some kinds of data only."""

OF_MODEL = ("heads", "patch")
"""Fields that mean something for some of the built-in models only."""

COUNTS = (
    "width",
    "epochs",
    "batch_size",
    "depth",
    "base_width",
    "patch",
    "heads",
    "context",
    "experts",
)
"""Fields that are at least 1."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines the result of one training run.

    Args:
        dataset: Name of the task, one of `matrigami.studies.TASKS`; or data of your own:
            `file.npz`, a folder of images, a text, `file.py:function`.
        model: Name of the model, one of `matrigami.studies.MODELS`, with its options, such as
            `gpt(positions=learned)`; or `file.py:function`.
        structure: Structure of the linear layers as text, e.g. `btt(rank=1)`; see
            `matrigami.parse`.
        width: Features of the residual stream.
        seed: Seed of the initial weights, the order of the data and the augmentation.
        lr: Learning rate of the dense model at `base_width`; scaled for each factor by
            `nn.param_groups`.
        epochs: Passes over the data (the teacher task: rounds of `samples_per_epoch` fresh
            samples).
        batch_size: Examples in a step.
        depth: Residual blocks.
        base_width: Width at which `lr` was tuned.
        weight_decay: Decoupled weight decay at `base_width`; what a step takes of a weight shrinks
            as the width grows. Biases and norms have none.
        label_smoothing: Share of the target that is spread over all classes.
        mixup: Parameter alpha of the Beta distribution of the mixing weight; 0 for none.
        augment: Random resized crop and horizontal flip.
        shuffle_pixels: Apply one fixed permutation to the pixels of every image.
        input_lr_scale: Factor on the learning rate of the layer that reads the data.
        structured_layers: Which layers carry the structure.
        samples_per_epoch: Fresh samples in an epoch of a task with unlimited data.
        checkpoint_seconds: Time between checkpoints; not part of the identity.
        patch: Side of the patches of the vision transformer, in pixels.
        heads: Attention heads of the vision transformer.
        optimizer: Optimiser as text: `adamw`, `sgd` or one of `matrigami.optim.OPTIMIZERS`, with
            options of its class, e.g. `soap(frequency=5)`.
        context: Tokens of an example of a text.
        vocabulary: Tokens of a byte-pair encoding of a text; left out for characters.
        side: Pixels to which images of a folder are resized; left out to keep their size.
        targets: Names of the layers of your own model that carry the structure, as a pattern such
            as `re:.*mlp.*`; left out for all but the last.
        experts: Members of the structure in each structured layer, a mixture; 1 for none.
        active: Experts that multiply each vector.
        mixture: What an expert is: a member in each structured `layer`, with a gate for each, or a
            `network`, the two layers of an MLP block with one gate, the usual mixture.
        score: Structure of the attention scores of a GPT, in place of `q . k`: multi-level low rank
            over the tokens, `mlr(2, 1, 1)` with its ranks as shares of the features of a head, or a
            bilinear form of each head, such as `btt(rank=1)`.
        folder: What paths of `dataset` and `model` are relative to; not part of the identity.
        data_hash: What the data of your own were when the study was planned.
        model_hash: The same of the model.

    Raises:
        ValueError: If a value is out of its range.

    Examples:
        >>> config = RunConfig(
        ...     "digits", "mlp", "btt(rank=1)", 64, seed=0, lr=3e-3, epochs=2, batch_size=64
        ... )
        >>> config.id, len(config.to_json())
        ('5e68720d8c5b', 33)
    """

    dataset: str
    model: str
    structure: str
    width: int
    seed: int
    lr: float
    epochs: int
    batch_size: int
    depth: int = 3
    base_width: int = 64
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    augment: bool = False
    shuffle_pixels: bool = False
    input_lr_scale: float = 0.1
    structured_layers: Layers = "all"
    samples_per_epoch: int | None = None
    checkpoint_seconds: float = 60.0
    patch: int = 8
    heads: int = 8
    optimizer: str = "adamw"
    context: int = 128
    vocabulary: int | None = None
    side: int | None = None
    targets: str = ""
    experts: int = 1
    active: int = 1
    mixture: Mixture = "layer"
    score: str = ""
    folder: str = ""
    data_hash: str = ""
    model_hash: str = ""

    def __post_init__(self) -> None:
        """Refuse what could not be trained."""
        for name in COUNTS:
            most = DEEPEST if name == "depth" else LARGEST_COUNT
            self._require(name, 1 <= getattr(self, name) <= most, f"from 1 to {most}")
        for name in ("samples_per_epoch", "vocabulary", "side"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1, or left out")
        for name in ("weight_decay", "mixup", "checkpoint_seconds", "input_lr_scale", "seed"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "at least 0 and finite")
        self._require("seed", self.seed < LARGEST_SEED, f"below {LARGEST_SEED}")
        self._require("lr", 0 < self.lr < math.inf, "above 0 and finite")
        self._require(
            "label_smoothing", 0 <= self.label_smoothing < 1, "from 0 up to (not including) 1"
        )
        self._require("active", 1 <= self.active <= self.experts, "from 1 to the experts")
        self._require("mixture", self.mixture in ("layer", "network"), "'layer' or 'network'")
        layers = self.structured_layers in ("all", "hidden")
        self._require("structured_layers", layers, "'all' or 'hidden'")

    @property
    def label(self) -> str:
        """The structure, how many of how many experts, and the score."""
        networks = " networks" if self.mixture == "network" else ""
        mixture = f", {self.active} of {self.experts}{networks}" if self.experts > 1 else ""
        score = f", score {self.score}" if self.score else ""
        return f"{self.structure}{mixture}{score}"

    @property
    def summary(self) -> dict[str, Any]:
        """What tells a run from others in a list."""
        known = {"id": self.id, "dataset": self.dataset, "structure": self.label}
        return known | {"optimizer": self.optimizer, "width": self.width, "seed": self.seed}

    def _require(self, name: str, valid: bool, range_: str) -> None:
        """One range."""
        if not valid:
            raise ValueError(
                f"A run on {self.dataset!r} with {name} = {getattr(self, name)!r}: "
                f"this value is out of range.\n{name} should be {range_}."
            )

    @property
    def canonical(self) -> str:
        """The identity as JSON with sorted keys."""
        identity = {
            field.name: float(value) if field.type is float else value  # 0 and 0.0 are one run
            for field in fields(self)
            if field.name not in NOT_IDENTITY
            for value in [getattr(self, field.name)]
            if field.name not in ADDED or value != field.default
        }
        return json.dumps(identity, sort_keys=True, separators=(",", ":"))

    @property
    def id(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 of `canonical`."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunConfig":
        """The inverse of `to_json`; fields that are missing take their defaults.

        Raises:
            ValueError: If a key is no field.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(
                f"RunConfig: a run has no settings {sorted(unknown)}.\n"
                f"Settings are: {', '.join(field.name for field in fields(cls))}."
            )
        return cls(**values)


def refuse_settings(config: RunConfig, of: Iterable[str], read: Iterable[str], kind: str) -> None:
    """Refuse settings that are not at their default, and that nothing would read.

    Args:
        config: The run.
        of: Fields that are looked at, such as `OF_DATA`.
        read: Those of them that mean something here.
        kind: What they are read by, in words.

    Raises:
        ValueError: If one is set that is not read.
    """
    defaults = {field.name: field.default for field in fields(RunConfig)}
    for name in of:
        value = getattr(config, name)
        if name not in read and value != defaults[name]:
            raise ValueError(
                f"A run of {config.model!r} on {config.dataset!r} with {name} = {value!r}: "
                f"it means nothing for {kind}.\n"
                "Nothing would read it, and the result would be that without it.\n"
                "Leave it out, or set it in the table [[task]] or [[structure]] that it is for."
            )
