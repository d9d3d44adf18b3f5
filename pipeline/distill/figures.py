"""The figures of a trained draft: `training.json` in its folder."""

from __future__ import annotations

from pipeline.models.draft_kind import DraftMethod
from pipeline.records import Record


class TextCounts(Record):
    """Counts of the data: sequences, their answer tokens, and the number of greedy sequences."""

    sequences: int = 0
    answer_tokens: int = 0
    greedy: int = 0

    def plus(self, other: TextCounts) -> TextCounts:
        """Return the sum of both."""
        return TextCounts(
            sequences=self.sequences + other.sequences,
            answer_tokens=self.answer_tokens + other.answer_tokens,
            greedy=self.greedy + other.greedy,
        )


class TrainingFacts(Record):
    """The settings of a training, as `training.TrainingSettings` has them, and the size of the draft's vocabulary."""

    steps: int
    batch_tokens: int
    rate: float
    warmup: int
    depths: int
    single: float
    depth_weight: float
    objective: str
    seed: int
    bfloat16: bool
    draft_vocab: int
    anchors: int = 0


class DraftFigures(Record):
    """Facts of a draft's training, and its accuracy by class on greedy answers to the prompts of the gates.

    `right_given_previous` is the chance of each draft token to be right, given that those before it are;
    `tokens_per_step` is what follows from it for K=4.
    """

    method: DraftMethod
    layers: tuple[int, ...]
    start: str | None
    start_share: float | None
    target: str
    data: TextCounts
    settings: TrainingFacts
    right_given_previous: dict[str, list[float]]
    tokens_per_step: dict[str, float]
