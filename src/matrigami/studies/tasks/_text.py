"""Prediction of the next token of a text.

The last tenth of the text is the test set. An example is a window of `context` tokens; an epoch
covers the text once, in windows that begin at a place drawn anew. The error is the cross-entropy in
percent of that of a guess that knows nothing but the number of tokens, so that its law has the
exponent of the loss; the loss itself is in nats a token.

Shapes: b = windows in a batch, t = tokens of a window, v = tokens of the vocabulary.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matrigami.studies._config import OF_DATA, RunConfig, refuse_settings
from matrigami.studies.tasks._base import Batch, Draws, Entry, Score, Shape
from matrigami.studies.tasks._datasets import data_folder, read_checked
from matrigami.studies.tasks._sources import SOURCES
from matrigami.studies.tasks._tokens import byte_pairs, characters

TEXT_SETTINGS = ("samples_per_epoch", "context", "vocabulary")
"""Settings of a run that mean something for a text."""

TEST_SHARE = 0.1

TEST_WINDOWS = 2000
"""Windows of the test set of a long text, evenly spread."""

TEST_BATCH = 100


class TextTask:
    """Windows of a text in memory.

    Args:
        text: All of it.
        context: Tokens of a window.
        vocabulary: Tokens of a byte-pair encoding; None for characters.
        samples: Windows in an epoch; by default as many as the text has.
        device: Where batches are made.

    Raises:
        ValueError: If the text is too short, or has more characters than the vocabulary.
    """

    def __init__(
        self,
        text: str,
        context: int,
        vocabulary: int | None = None,
        *,
        samples: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        cut = len(text) - int(TEST_SHARE * len(text))
        alphabet = "".join(sorted(set(text)))
        if vocabulary is not None and vocabulary < len(alphabet):
            raise ValueError(
                f"A vocabulary of {vocabulary} tokens: "
                f"the text has {len(alphabet)} different characters.\n"
                "Give a larger vocabulary, or leave it out for characters."
            )
        self.tokens = (
            characters(text) if vocabulary is None else byte_pairs(text[:cut], vocabulary, alphabet)
        )
        self.device = torch.device(device)
        self._train, self._test = (
            torch.tensor(self.tokens.encode(part)).to(self.device)
            for part in (text[:cut], text[cut:])
        )
        if min(len(self._train), len(self._test)) <= context:
            raise ValueError(
                f"Windows of {context} tokens: "
                f"the text has {len(self._train)} tokens, and {len(self._test)} for the test.\n"
                "Give a longer text, or a smaller context."
            )
        self.shape = Shape(context, 1, len(self.tokens.tokens), is_text=True)
        self.samples = samples
        self.examples = samples or max(1, (len(self._train) - context) // context)
        whole = (len(self._test) - 1) // context
        self.tests = min(whole, TEST_WINDOWS)
        self._places = torch.arange(self.tests) * whole // self.tests * context

    @property
    def likelihood(self) -> nn.Module:
        """What the loss stands for."""
        return nn.CrossEntropyLoss()

    def plan(self, batch_size: int, generator: torch.Generator) -> Draws:  # noqa: ARG002 - one signature for all tasks
        """Draw an epoch: where its windows begin."""
        context, last = self.shape.channels, len(self._train) - self.shape.channels
        if self.samples is not None:
            return Draws(
                self._at(torch.randint(last, (self.samples,), generator=generator)), None, []
            )
        first = torch.randint(last - (self.examples - 1) * context, (1,), generator=generator)
        order = torch.randperm(self.examples, generator=generator)
        return Draws(self._at(first + order * context), None, [])

    def batch(self, plan: Draws, start: int, size: int) -> Batch:
        """Windows `start` to `start + size` of an epoch."""
        return self._windows(self._train, plan.order[start : start + size])

    def test_batches(self) -> Iterator[Batch]:
        """The test set."""
        for places in self._places.split(TEST_BATCH):
            yield self._windows(self._test, self._at(places))

    def score(self, outputs: Float[Tensor, "b v t"], batch: Batch) -> Score:
        """Cross-entropy, and the same in shares of `log v`."""
        rows = outputs.mT.reshape(-1, self.shape.outputs)
        loss = nn.functional.cross_entropy(rows, batch.targets.reshape(-1))
        total = loss.detach() * len(outputs)
        return Score(loss, total, total / math.log(max(2, self.shape.outputs)))

    def _at(self, places: Tensor) -> Tensor:
        """Places on the device."""
        return places.to(self.device)

    def _windows(self, tokens: Tensor, places: Tensor) -> Batch:
        """Windows that begin at some places, and what comes after each token."""
        index = places[:, None] + torch.arange(self.shape.channels + 1, device=self.device)
        windows = tokens[index]
        return Batch(windows[:, :-1], windows[:, 1:])


def text_task(text: str, config: RunConfig, device: torch.device) -> TextTask:
    """The task of a run on a text.

    Raises:
        ValueError: If the text is too short, or a setting means nothing for it.
    """
    refuse_settings(config, OF_DATA, TEXT_SETTINGS, "a text")
    samples = config.samples_per_epoch
    return TextTask(text, config.context, config.vocabulary, samples=samples, device=device)


def _load(
    name: str, file: str, config: RunConfig, data_dir: Path | None, device: torch.device
) -> TextTask:
    """The task of a run on a text that is known by name."""
    content = read_checked(SOURCES[name], file, data_folder(data_dir))
    return text_task(content.decode("utf-8"), config, device)


TEXTS: dict[str, Entry] = {
    "tinyshakespeare": Entry(
        "plays by Shakespeare, 1.1 MB of 65 different characters",
        partial(_load, "tinyshakespeare", "input.txt"),
        "matrigami data get tinyshakespeare",
        TEXT_SETTINGS,
    )
}
"""The texts."""
