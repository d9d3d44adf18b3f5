"""Fit a draft to the target's text: minimise the divergence from the target's distribution over the draft's tokens.

Data, settings and seed decide the result. Weights, optimiser state and step are saved together, so a killed run resumes
at its last save; weights are float32, products bfloat16 if the settings say so.

Shapes: M learned positions, H hidden, V draft vocabulary.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.artifact.host import multiplies
from pipeline.distill.data import Conversation
from pipeline.files.atomic import write_atomic
from pipeline.models.config import ModelConfig
from pipeline.models.weights import EMBEDDING
from pipeline.progress import Log
from pipeline.speculation.chains import Batch, Guess

Guesses = Callable[[ModelConfig, dict[str, Tensor], Batch, int], Iterator[Guess]]
"""A kind of draft: its answers to a batch, one depth after the other."""


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training. `objective` is `distribution`, the target's, or `token`, only the token that it chose.

    A share `single` of the steps, at the start, learns one drafted token at a third of the cost; the others `depths` in
    a row. `anchors` is the number of random positions of a sequence at which blocks begin in a step; 0: every position.
    """

    steps: int = 2000
    batch_tokens: int = 1024
    rate: float = 1e-3
    warmup: int = 50
    depths: int = 3
    single: float = 0.2
    depth_weight: float = 0.8
    objective: str = "distribution"
    seed: int = 0
    bfloat16: bool = True
    anchors: int = 0


def has_bfloat16(device: str) -> bool:
    """Return whether a device multiplies bfloat16 with its own instructions; torch's emulation is 20 times slower."""
    if torch.device(device).type != "cpu":
        return True
    return multiplies("bfloat16")


@dataclass
class Accuracy:
    """Held-out accuracy: at each depth the number of chains that were right before it, and at it."""

    reached: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)

    @property
    def given_previous(self) -> list[float]:
        """Rate of correct draft tokens at each depth, given that all before are correct."""
        return [r / max(n, 1) for n, r in zip(self.reached, self.right, strict=True)]

    def tokens_per_step(self, steps: int) -> float:
        """Return the expected tokens of a greedy step with K = `steps`; unmeasured depths repeat the last rate."""
        rates = self.given_previous
        chances = [math.prod((rates + rates[-1:] * steps)[: k + 1]) for k in range(steps)]
        return 1 + sum(chances)


@dataclass(frozen=True)
class InitialDraft:
    """A draft before its training: the function of its kind, its config, and float32 weights."""

    guesses: Guesses
    config: ModelConfig
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class TargetTables:
    """The target's embedding, and the rows of its LM head for the draft's ids, on the device of the training."""

    embedding: Tensor
    head_VH: Tensor
    ids_V: Tensor


@dataclass
class Trainer:
    """A draft in training, and the folder of its saved state."""

    draft: InitialDraft
    target: TargetTables
    settings: TrainingSettings
    folder: Path
    log: Log
    step: int = 0

    def __post_init__(self) -> None:
        self.device = self.target.head_VH.device
        self.trained = {name: w.to(self.device, copy=True).requires_grad_() for name, w in self.draft.weights.items()}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=self.settings.rate, weight_decay=0.0, betas=(0.9, 0.95)
        )
        if self._state.is_file():
            self._load()

    def train(self, sequences: Sequence[Conversation], held_out: Sequence[Conversation]) -> None:
        """Train to the last step; log the accuracy on `held_out` every 400 steps."""
        started, first = time.monotonic(), self.step
        losses: list[float] = []
        for batch in self._batches(sequences):
            if self.step >= self.settings.steps:
                break
            losses.append(self._update(batch))
            self.step += 1
            if self.step % 50 == 0 or self.step == self.settings.steps:
                self._save()
                left = (time.monotonic() - started) / (self.step - first) * (self.settings.steps - self.step)
                loss = sum(losses[-50:]) / len(losses[-50:])
                self.log(f"step {self.step} of {self.settings.steps}, loss {loss:.3f}, {left / 60:.0f} min left")
            if self.step % 400 == 0 and held_out:
                self.log(describe(self.accuracy(held_out)))

    @torch.inference_mode()
    def accuracy(self, sequences: Sequence[Conversation]) -> Accuracy:
        """Return the accuracy of greedy answers against the tokens that the target chose."""
        accuracy = Accuracy([0] * self.settings.depths, [0] * self.settings.depths)
        for start in range(0, len(sequences), 8):
            batch = make_batch(sequences[start : start + 8], self.device)
            right_BT = torch.ones_like(batch.learn_BT)
            for depth, guess in enumerate(self._guesses(batch, self.settings.depths)):
                chains = guess.rows_M, guess.began_M
                before_M = right_BT[chains]
                best_M = self.target.ids_V[guess.logits_MV.argmax(-1)]
                right_M = before_M & (best_M == batch.tokens_BT1[guess.rows_M, guess.positions_M + 1])
                accuracy.reached[depth] += int(before_M.sum())
                accuracy.right[depth] += int(right_M.sum())
                right_BT = torch.zeros_like(right_BT)
                right_BT[chains] = right_M
        return accuracy

    @torch.no_grad()
    def average(self, share: float) -> None:
        """Average with the initial weights, with this share of them (Wortsman et al. 2022, WiSE-FT)."""
        for name, w in self.trained.items():
            w.lerp_(self.draft.weights[name].to(w.device), share)

    def export(self) -> dict[str, Tensor]:
        """Return the trained weights, on the CPU."""
        return {name: w.detach().cpu() for name, w in self.trained.items()}

    def _guesses(self, batch: Batch, depths: int) -> Iterator[Guess]:
        weights = {**self.trained, EMBEDDING: self.target.embedding}
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.bfloat16):
            yield from self.draft.guesses(self.draft.config, weights, batch, depths)

    def _update(self, batch: Batch) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * self._schedule()
        depths = 1 if self.step < self.settings.single * self.settings.steps else self.settings.depths
        expected = self._expected(batch) if self.settings.objective == "distribution" else None
        # Answers may be too short for the last depths: a mean of no positions is NaN.
        losses = [self._loss(batch, guess, expected) for guess in self._guesses(batch, depths) if len(guess.rows_M)]
        shares = [self.settings.depth_weight**depth for depth in range(len(losses))]
        weighted = (share * loss for share, loss in zip(shares, losses, strict=True))
        loss = sum(weighted, torch.zeros(())) / sum(shares)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def _expected(self, batch: Batch) -> _Expected:
        """Return the target's distributions over the draft's tokens, computed once for all depths."""
        last_MH = batch.last_BTH[batch.learn_BT]
        number_BT = (batch.learn_BT.flatten().cumsum(0) - 1).view(batch.learn_BT.shape)
        logits_MV = (last_MH @ self.target.head_VH.T.to(last_MH.dtype)).float()
        return _Expected(torch.softmax(logits_MV, dim=-1), number_BT)

    def _loss(self, batch: Batch, guess: Guess, expected: _Expected | None) -> Tensor:
        """Return the cross-entropy to the target's distribution over the draft's tokens, or to the chosen token."""
        log_probs_MV = torch.log_softmax(guess.logits_MV.float(), dim=-1)
        if expected is not None:
            probs_MV = expected.probs_MV[expected.number_BT[guess.rows_M, guess.positions_M]]
            return -(probs_MV * log_probs_MV).sum(-1).mean()
        ids_V, tokens_M = self.target.ids_V, batch.tokens_BT1[guess.rows_M, guess.positions_M + 1]
        chosen_M = torch.searchsorted(ids_V, tokens_M).clamp(max=len(ids_V) - 1)
        known_M = ids_V[chosen_M] == tokens_M
        return -log_probs_MV[known_M].gather(-1, chosen_M[known_M, None]).mean()

    def _schedule(self) -> float:
        """Return the factor of the learning rate: a warm-up, then a cosine down to a twentieth."""
        if self.step < self.settings.warmup:
            return (self.step + 1) / self.settings.warmup
        done = (self.step - self.settings.warmup) / max(self.settings.steps - self.settings.warmup, 1)
        return 0.05 + 0.95 * (1 + math.cos(math.pi * min(done, 1))) / 2

    def _batches(self, sequences: Sequence[Conversation]) -> Iterator[Batch]:
        """Yield endless batches from the current step on, shuffled in each epoch, of sequences of similar length."""
        number = 0
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed(self.settings.seed * 1000 + epoch)
            for chosen in _grouped(sequences, self.settings.batch_tokens, generator):
                if number >= self.step:
                    batch = make_batch([sequences[i] for i in chosen], self.device)
                    yield with_anchors(batch, self.settings.anchors, self.settings.seed * 2**32 + number)
                number += 1
            epoch += 1

    @property
    def _state(self) -> Path:
        return self.folder / "training.safetensors"

    def _save(self) -> None:
        tensors = dict(self.export())
        for name, w in self.trained.items():
            state = self.optimizer.state[w]
            tensors |= {f"{part}/{name}": state[part] for part in ("exp_avg", "exp_avg_sq")}
        facts = {"step": str(self.step), "settings": json.dumps(asdict(self.settings))}
        write_atomic(self._state, save(tensors, facts))

    def _load(self) -> None:
        with safe_open(self._state, framework="pt") as file:
            facts = file.metadata()
            if json.loads(facts["settings"]) != asdict(self.settings):
                self.log("settings differ from those of the interrupted run; training starts again")
                return
            self.step = int(facts["step"])
            with torch.no_grad():
                for name, w in self.trained.items():
                    w.copy_(file.get_tensor(name))
                    moments = {
                        part: file.get_tensor(f"{part}/{name}").to(w.device) for part in ("exp_avg", "exp_avg_sq")
                    }
                    self.optimizer.state[w] = {"step": torch.tensor(float(self.step)), **moments}
        self.log(f"resuming at step {self.step}")


@dataclass(frozen=True)
class _Expected:
    """Distributions of the target [M, V], and for each position of a batch [B, T] the index of its distribution."""

    probs_MV: Tensor
    number_BT: Tensor


def make_batch(sequences: Sequence[Conversation], device: torch.device | str) -> Batch:
    """Return sequences padded to the same length."""
    tokens = pad_sequence([s.tokens.long() for s in sequences], batch_first=True)
    taps = pad_sequence([s.taps_TX for s in sequences], batch_first=True)
    last = pad_sequence([s.last_TH for s in sequences], batch_first=True)
    positions = torch.arange(taps.shape[1])
    lengths = torch.tensor([len(s.tokens) for s in sequences])[:, None]
    prompts = torch.tensor([s.prompt for s in sequences])[:, None]
    learn = (positions >= prompts - 1) & (positions < lengths - 1)
    return Batch(tokens.to(device), taps.to(device), last.to(device), learn.to(device))


def with_anchors(batch: Batch, count: int, seed: int) -> Batch:
    """Return the batch with `count` random blocks in each sequence; 0: a block at every position.

    A block begins where its first answer is to learn (arXiv 2602.06036, training); with fewer such positions than
    `count`, some begin twice.

    Shapes: `begins_BA` of the result is int64 [B, count].
    """
    if not count:
        return batch
    usable_BT = torch.nn.functional.pad(batch.learn_BT[:, 1:], (0, 1)).float().cpu()
    usable_BT[usable_BT.sum(dim=1) == 0] = 1  # nothing to learn: any position, since none of its answers counts
    generator = torch.Generator().manual_seed(seed)
    begins_BA = torch.multinomial(usable_BT, count, replacement=True, generator=generator)
    return replace(batch, begins_BA=begins_BA.to(batch.learn_BT.device))


def _grouped(sequences: Sequence[Conversation], tokens: int, generator: torch.Generator) -> list[list[int]]:
    """Return batches, as indices, of at most `tokens` padded tokens each, in random order."""
    jitter = torch.rand(len(sequences), generator=generator)
    lengths = [len(sequence.tokens) for sequence in sequences]
    order = sorted(range(len(sequences)), key=lambda i: lengths[i] + 40 * float(jitter[i]))
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and (len(batches[-1]) + 1) * max(lengths[j] for j in (*batches[-1], i)) > tokens:
            batches.append([])
        batches[-1].append(i)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def describe(accuracy: Accuracy) -> str:
    """Return the accuracy as a line for the log."""
    rates = ", ".join(f"{rate:.2f}" for rate in accuracy.given_previous)
    per_step = accuracy.tokens_per_step(4)
    return f"held-out acceptance rate by position: {rates}; tokens per step (K=4): {per_step:.2f}"
