"""Fit a draft to what the target wrote: minimise the divergence from the target's distribution over the draft's tokens.

A run is decided by its data, settings and seed. It saves weights, optimiser and step together, so a killed run goes on
where it was; weights are float32, products bfloat16 where the device is faster with them.

Shapes: M learned positions, H hidden, V draft vocabulary.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.distill.data import Conversation
from pipeline.distill.eagle3 import Batch, Guess
from pipeline.files.atomic import write_atomic
from pipeline.models.config import ModelConfig
from pipeline.models.weights import EMBEDDING
from pipeline.progress import Log

Guesses = Callable[[ModelConfig, dict[str, Tensor], Batch, int], Iterator[Guess]]
"""A kind of draft: its answers to a batch, one depth after the other."""


@dataclass(frozen=True)
class Settings:
    """How to train. `objective`: the target's distribution, or only the token it chose.

    The first `single` of the steps learn one drafted token, which costs a third; the others `depths` in a row.
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


@dataclass
class Accuracy:
    """Held-out guesses: at each depth how many chains were right so far, and right again."""

    reached: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)

    @property
    def given_previous(self) -> list[float]:
        """Chance that a draft token is right, given that all before it are."""
        return [r / max(n, 1) for n, r in zip(self.reached, self.right, strict=True)]

    def tokens_per_step(self, steps: int) -> float:
        """Expected tokens of a greedy step with K = `steps`; depths beyond the last measured repeat it."""
        rates = self.given_previous
        chances = [math.prod((rates + rates[-1:] * steps)[: k + 1]) for k in range(steps)]
        return 1 + sum(chances)


@dataclass
class Trainer:
    """A draft in training. `weights` are float32, `head_VH` the rows of the target's LM head for the draft's ids."""

    guesses: Guesses
    config: ModelConfig
    weights: dict[str, Tensor]
    embedding: Tensor
    head_VH: Tensor
    ids_V: Tensor
    settings: Settings
    folder: Path
    log: Log
    step: int = 0

    def __post_init__(self) -> None:
        device = self.head_VH.device
        self.trained = {name: w.to(device, copy=True).requires_grad_() for name, w in self.weights.items()}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=self.settings.rate, weight_decay=0.0, betas=(0.9, 0.95)
        )
        if self._state.is_file():
            self._load()

    def train(self, sequences: Sequence[Conversation], held_out: Sequence[Conversation]) -> None:
        """Train to the last step; says the accuracy on `held_out` now and then."""
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
        """Greedy guesses against the tokens that the target chose."""
        found = Accuracy([0] * self.settings.depths, [0] * self.settings.depths)
        for start in range(0, len(sequences), 8):
            batch = make_batch(sequences[start : start + 8], self.head_VH.device)
            right = torch.ones_like(batch.learn_BT)
            for depth, guess in enumerate(self._guesses(batch, self.settings.depths)):
                rows, places = guess.index
                began = guess.began_M
                so_far = right[rows, began]
                best = self.ids_V[guess.logits_MV.argmax(-1)]
                now = so_far & (best == batch.tokens_BT1[rows, places + 1])
                found.reached[depth] += int(so_far.sum())
                found.right[depth] += int(now.sum())
                right = torch.zeros_like(right)
                right[rows, began] = now
        return found

    @torch.no_grad()
    def average(self, share: float) -> None:
        """Go a share of the way back to the start: what it was good at stays (Wortsman et al. 2022, WiSE-FT)."""
        for name, w in self.trained.items():
            w.lerp_(self.weights[name].to(w.device), share)

    def export(self) -> dict[str, Tensor]:
        """The trained weights."""
        return {name: w.detach().cpu() for name, w in self.trained.items()}

    def _guesses(self, batch: Batch, depths: int) -> Iterator[Guess]:
        weights = {**self.trained, EMBEDDING: self.embedding}
        kind = self.head_VH.device.type
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=self.settings.bfloat16):
            yield from self.guesses(self.config, weights, batch, depths)

    def _update(self, batch: Batch) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * self._schedule()
        depths = 1 if self.step < self.settings.single * self.settings.steps else self.settings.depths
        wanted = self._wanted(batch) if self.settings.objective == "distribution" else None
        losses = [self._loss(batch, guess, wanted) for guess in self._guesses(batch, depths)]
        shares = [self.settings.depth_weight**depth for depth in range(len(losses))]
        loss = sum((w * one for w, one in zip(shares, losses, strict=True)), torch.zeros(())) / sum(shares)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def _wanted(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The target's distributions over the draft's tokens [M, V], once for all depths, and which is where [B, T]."""
        last_MH = batch.last_BTH[batch.learn_BT]
        number_BT = (batch.learn_BT.flatten().cumsum(0) - 1).view(batch.learn_BT.shape)
        return torch.softmax((last_MH @ self.head_VH.T.to(last_MH.dtype)).float(), dim=-1), number_BT

    def _loss(self, batch: Batch, guess: Guess, wanted: tuple[Tensor, Tensor] | None) -> Tensor:
        """Cross-entropy to the target's distribution over the draft's tokens, or to the token that was chosen."""
        rows, places = guess.index
        log_probs_MV = torch.log_softmax(guess.logits_MV.float(), dim=-1)
        if wanted is not None:
            wanted_MV, number_BT = wanted
            return -(wanted_MV[number_BT[rows, places]] * log_probs_MV).sum(-1).mean()
        chosen_M = torch.searchsorted(self.ids_V, batch.tokens_BT1[rows, places + 1]).clamp(max=len(self.ids_V) - 1)
        known_M = self.ids_V[chosen_M] == batch.tokens_BT1[rows, places + 1]
        return -log_probs_MV[known_M].gather(-1, chosen_M[known_M, None]).mean()

    def _schedule(self) -> float:
        """Warm-up, then a cosine to a twentieth."""
        if self.step < self.settings.warmup:
            return (self.step + 1) / self.settings.warmup
        done = (self.step - self.settings.warmup) / max(self.settings.steps - self.settings.warmup, 1)
        return 0.05 + 0.95 * (1 + math.cos(math.pi * min(done, 1))) / 2

    def _batches(self, sequences: Sequence[Conversation]) -> Iterator[Batch]:
        """Endless batches from the current step on, shuffled anew in each epoch; sequences of like length together."""
        seen = 0
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed(self.settings.seed * 1000 + epoch)
            for chosen in _grouped(sequences, self.settings.batch_tokens, generator):
                if seen >= self.step:
                    yield make_batch([sequences[i] for i in chosen], self.head_VH.device)
                seen += 1
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
                self.log("other settings than the run that was interrupted: starting over")
                return
            self.step = int(facts["step"])
            with torch.no_grad():
                for name, w in self.trained.items():
                    w.copy_(file.get_tensor(name))
                    moments = {
                        part: file.get_tensor(f"{part}/{name}").to(w.device) for part in ("exp_avg", "exp_avg_sq")
                    }
                    self.optimizer.state[w] = {"step": torch.tensor(float(self.step)), **moments}
        self.log(f"going on at step {self.step}")


def make_batch(sequences: Sequence[Conversation], device: torch.device | str) -> Batch:
    """Pad sequences to one length."""
    tokens = pad_sequence([s.tokens.long() for s in sequences], batch_first=True)
    taps = pad_sequence([s.taps_TX for s in sequences], batch_first=True)
    last = pad_sequence([s.last_TH for s in sequences], batch_first=True)
    places = torch.arange(taps.shape[1])
    lengths, prompts = (torch.tensor([n(s) for s in sequences])[:, None] for n in (_length, _prompt))
    learn = (places >= prompts - 1) & (places < lengths - 1)
    return Batch(tokens.to(device), taps.to(device), last.to(device), learn.to(device))


def _length(sequence: Conversation) -> int:
    return len(sequence.tokens)


def _prompt(sequence: Conversation) -> int:
    return sequence.prompt


def _grouped(sequences: Sequence[Conversation], tokens: int, generator: torch.Generator) -> list[list[int]]:
    """Batches of at most so many padded tokens, in random order."""
    jitter = torch.rand(len(sequences), generator=generator)
    order = sorted(range(len(sequences)), key=lambda i: _length(sequences[i]) + 40 * float(jitter[i]))
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and (len(batches[-1]) + 1) * max(_length(sequences[j]) for j in (*batches[-1], i)) > tokens:
            batches.append([])
        batches[-1].append(i)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def describe(accuracy: Accuracy) -> str:
    """One line for a reader."""
    rates = ", ".join(f"{rate:.2f}" for rate in accuracy.given_previous)
    return f"held out: draft tokens right, given those before: {rates}; {accuracy.tokens_per_step(4):.2f} tokens a step"
