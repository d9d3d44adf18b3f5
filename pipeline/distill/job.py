"""One distillation: what data it needs, what is held out, and the trainer that starts from the target."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.distill import draft_model, eagle3
from pipeline.distill.data import PART, Conversation, Prompts, is_part, read_part, write_part, write_transcripts
from pipeline.distill.generate import Writer, Writing
from pipeline.distill.head import frequent, head_config, initial, layers_of, model_config
from pipeline.distill.prompts import SENTINEL, HeldOutFilter
from pipeline.distill.request import ANSWER_TOKENS, LENGTH, ROWS, Request, data_key
from pipeline.distill.train import Settings, Trainer
from pipeline.errors import InputError
from pipeline.files.atomic import write_atomic
from pipeline.models.eagle3 import read_config
from pipeline.models.families import config_of
from pipeline.models.weights import D2T, EMBEDDING, HEAD
from pipeline.runtime.text import Text
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.tokenizer import tokenizer_files
from pipeline.sources.weights import weights
from pipeline.validate.prompts import Prompt, load_prompts, prompts_path
from pipeline.validate.reference.goldens import read_tensor

SHORTEST = 4
"""Answers of fewer tokens teach nothing."""

SAME_STATES = 0.1
"""Hidden states on disk may differ by this much from what the target gives, relative: rounding is a tenth of it."""


@dataclass
class Job:
    """A target, its data folder, the draft to train further if there is one, and what was counted.

    `taps` are the layers whose inputs are kept with the data, `vocab` the tokens that the draft may propose.
    """

    request: Request
    target: Checkpoint
    taps: tuple[int, ...]
    vocab: int
    start: Checkpoint | None = None
    counts: dict[str, int] = field(default_factory=dict)

    @cached_property
    def folder(self) -> Path:
        """Where data and training of this target lie."""
        return self.request.cache / "distill" / data_key(self.request, self.target.revision, self.taps)

    @property
    def chooses_anew(self) -> bool:
        """Whether a draft that is trained further gets another vocabulary; it keeps the rows that it has of it."""
        return self.start is not None and self.request.draft_vocab is not None

    @cached_property
    def text(self) -> Text:
        """The target's tokenizer and chat template."""
        folder = self.folder / "tokenizer"
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in tokenizer_files(self.target).items():
            write_atomic(folder / name, data)
        return Text(folder)

    @cached_property
    def evaluated(self) -> list[Prompt]:
        """The recipe's own prompts: measured on, never trained on."""
        return load_prompts(prompts_path(self.request.recipe.validate_.prompts, self.request.base))

    @cached_property
    def held_out_filter(self) -> HeldOutFilter:
        """Keeps those out of what is trained on."""
        return HeldOutFilter(prompt.text for prompt in self.evaluated)

    @cached_property
    def writer(self) -> Writer:
        """The target, loaded to write."""
        return Writer(self.target, self.request.recipe.target.dtype, ROWS, LENGTH, self.taps, self.request.device)

    @cached_property
    def config_json(self) -> dict[str, Any]:
        """The draft's `config.json`."""
        request = self.request
        if self.start is not None:
            own = {key: value for key, value in self.start.config_json.items() if key != "shares_embedding"}
            return own | {"draft_vocab_size": self.vocab}
        if request.method == "draft_model":
            return model_config(self.target, self.vocab, request.layers)
        return head_config(self.target, self.vocab, self.taps)

    def write_data(self) -> None:
        """Write parts until there are as many answer tokens as asked for."""
        log, held_out_filter = self.request.log, self.held_out_filter
        for folder in self.request.text:
            self._check_text(folder)
        if self.request.transcripts is not None:
            kept = [pair for pair in _conversations(self.request.transcripts) if held_out_filter(pair[0])]
            tokens = [(self._encode(prompt), self.text.encode(answer, special=False)) for prompt, answer in kept]
            write_transcripts(self.folder / "data", "given", tokens, self.writer)
        given = _lines(self.request.prompts, "prompt") if self.request.prompts else []
        prompts = Prompts(self.text, held_out_filter, given, self.request.seed)
        number = 0
        log(f"text in {self.folder / 'data'}")
        while self._count() < self.request.tokens:
            if given and number * PART >= len(given):
                break
            write_part(self.folder / "data", number, PART, self.writer, prompts, ANSWER_TOKENS, log)
            number += 1
            log(f"{self._count()} of {self.request.tokens} tokens written")

    def sequences(self) -> list[Conversation]:
        """All that may be trained on: whoever wrote it, and whenever, only where its prompts are kept apart today.

        Raises:
            InputError: there is nothing.

        """
        written = (s for path in (*self._parts(), *self._given()) for s in read_part(path))
        found = [s for s in written if len(s.tokens) - s.prompt >= SHORTEST and self.held_out_filter(self._prompt(s))]
        if not found:
            what = "nothing to learn from: prompts are too long or those of the gates, or answers too short"
            raise InputError(what, where=str(self.folder / "data"), fix="give other prompts: --prompts FILE")
        return found

    def held_out(self) -> dict[str, list[Conversation]]:
        """Greedy answers to the recipe's prompts, by class."""
        asked = [
            Writing(self._encode(p.text)[-LENGTH // 2 :], ANSWER_TOKENS, 0.0, i) for i, p in enumerate(self.evaluated)
        ]
        found: dict[str, list[Conversation]] = {}
        for written in sorted(self.writer.write(asked), key=lambda w: w.request.seed):
            tokens = torch.tensor(written.tokens, dtype=torch.int32)
            sequence = Conversation(tokens, len(written.request.tokens), written.taps_TX, written.last_TH)
            found.setdefault(self.evaluated[written.request.seed].kind, []).append(sequence)
        return found

    def ids(self, sequences: Sequence[Conversation]) -> Tensor:
        """Target ids of the reduced vocabulary, ascending int64: the start's, or those written most often."""
        if self.start is not None and not self.chooses_anew:
            return _ids_of(self.start)
        written = (s.tokens[s.prompt :] for s in sequences)
        return frequent(written, self.vocab, self.target.config.eos_ids)

    def trainer(self, sequences: Sequence[Conversation]) -> Trainer:
        """A draft at its start, or where an interrupted run left it."""
        request, ids = self.request, self.ids(sequences)
        refs = weights(self.target)
        device = request.device
        embedding = read_tensor(refs[EMBEDDING]).float().to(device)
        head = embedding if self.target.config.tied else read_tensor(refs[HEAD]).float().to(device)
        settings = Settings(steps=request.steps, objective=request.objective, seed=request.seed)
        if self.start is not None:  # it knows one token ahead: what it knows of more is not unlearned first
            settings = replace(settings, single=0.0)
        if request.method == "draft_model":
            config = config_of(self.config_json, "draft")
            start = layers_of(self.target, config, request.layers, ids)
            settings, guesses = replace(settings, single=1.0), draft_model.guesses
        else:
            config = read_config(self.config_json, "head")
            start, guesses = initial(self.target, self.config_json, ids, request.seed), eagle3.guesses
        if self.start is not None:
            found = weights(self.start)
            known = {weight: read_tensor(found[weight]).float() for weight in start}
            if self.chooses_anew:
                known[HEAD] = _rows(known[HEAD], _ids_of(self.start), start[HEAD], ids)
            start = known
        folder, ids = self.folder / self._name(sequences, ids), ids.to(device)
        return Trainer(guesses, config, start, embedding, head[ids], ids, settings, folder, request.log)

    def _name(self, sequences: Sequence[Conversation], ids: Tensor) -> str:
        """Names a training by what decides it beside its settings: text, vocabulary, and where the draft starts."""
        digest = hashlib.sha256(ids.numpy().tobytes())
        for s in sequences:
            digest.update(f"{s.prompt} {len(s.tokens)} ".encode() + s.tokens.numpy().tobytes())
        name = f"{self.request.objective}-{self.vocab}-{digest.hexdigest()[:16]}"
        if self.request.method == "draft_model":
            name += "-layers-" + "-".join(map(str, self.request.layers))
        return name if self.start is None else f"{name}-from-{self.start.revision[-8:]}"

    def _encode(self, prompt: str) -> list[int]:
        return self.text.chat(prompt) if self.text.has_chat else self.text.encode(prompt)

    def _prompt(self, sequence: Conversation) -> str:
        """What the user said."""
        before, after = self._template
        text = self.text.decode(sequence.tokens[: sequence.prompt].tolist())
        return text.removeprefix(before).removesuffix(after)

    @cached_property
    def _template(self) -> tuple[str, str]:
        """Text around what the user said, as it is decoded: special tokens left out."""
        parts = (self.text.chat_text(SENTINEL) if self.text.has_chat else "").partition(SENTINEL)
        before, _, after = (self.text.decode(self.text.encode(part, special=False)) for part in parts)
        return before, after

    def _parts(self) -> list[Path]:
        return _parts_in(self.folder / "data")

    def _given(self) -> list[Path]:
        """Parts of earlier runs; a folder that is named twice, or is this run's own, counts once."""
        own = (self.folder / "data").resolve()
        folders = dict.fromkeys(folder.resolve() for folder in self.request.text)
        return [path for folder in folders if folder != own for path in _parts_in(folder)]

    def _check_text(self, folder: Path) -> None:
        """Compare the hidden states of its first sequence with what the target gives: no other model's are learned."""
        parts = _parts_in(folder)
        for path in parts:
            if not is_part(path):
                raise InputError("not text that a run wrote, or damaged", where=str(path), fix="remove that file")
        stored = next((sequence for path in parts for sequence in read_part(path)), None)
        if stored is None:
            raise InputError("no text there", where=str(folder), fix="name the folder that a run said its text is in")
        tokens = stored.tokens.tolist()
        (seen,) = self.writer.read([(tokens[: stored.prompt], tokens[stored.prompt :])])
        for old, new in ((stored.taps_TX, seen.taps_TX), (stored.last_TH, seen.last_TH)):
            if old.shape != new.shape or (old.float() - new.float()).norm() > SAME_STATES * new.float().norm():
                taps = ", ".join(map(str, self.taps))
                what = f"not the hidden states that the target has before layers {taps}"
                raise InputError(what, where=str(folder), fix="name text that was written for this target")

    def _count(self) -> int:
        """Answer tokens on disk, from the parts' headers."""
        totals = {"sequences": 0, "answer_tokens": 0, "greedy": 0}
        for path in (*self._parts(), *self._given()):
            with safe_open(path, framework="pt") as file:
                for name, value in json.loads(file.metadata()["counts"]).items():
                    totals[name] += value
        self.counts = totals
        return totals["answer_tokens"]


def _parts_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _ids_of(draft: Checkpoint) -> Tensor:
    """Target ids of a draft's vocabulary, ascending int64."""
    offsets = read_tensor(weights(draft)[D2T])
    return torch.arange(len(offsets)) + offsets.long()


def _rows(old_VH: Tensor, old_ids_V: Tensor, new_UH: Tensor, ids_U: Tensor) -> Tensor:
    """Rows of `ids_U`: those of `old_VH` that it has, the others from `new_UH`."""
    places_U = torch.searchsorted(old_ids_V, ids_U).clamp(max=len(old_ids_V) - 1)
    kept_U1 = (old_ids_V[places_U] == ids_U)[:, None]
    return torch.where(kept_U1, old_VH[places_U], new_UH)


def _conversations(path: Path) -> list[tuple[str, str]]:
    return list(zip(_lines(path, "prompt"), _lines(path, "answer"), strict=True))


def _lines(path: Path, key: str) -> list[str]:
    """One field of every JSON line."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path), fix="check the path") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(str(json.loads(line)[key]))
        except (ValueError, KeyError, TypeError) as error:
            fix = f'write one JSON object a line, with "{key}"'
            raise InputError("not such a line", where=f"{path}:{number}", fix=fix) from error
    if not found:
        raise InputError("no lines", where=str(path), fix=f'write one JSON object a line, with "{key}"')
    return found
