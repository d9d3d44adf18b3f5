"""One distillation: its data, its held-out prompts, and a trainer of its draft."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.distill.block import block_config, block_training, hub_name, read_block
from pipeline.distill.data import (
    PART,
    Conversation,
    Prompts,
    TextProgress,
    count_part,
    is_part,
    read_part,
    write_part,
    write_transcripts,
)
from pipeline.distill.figures import TextCounts
from pipeline.distill.generate import Transcript, Writer, Writing
from pipeline.distill.head import (
    continued_config,
    frequent,
    head_config,
    initial,
    layers_of,
    model_config,
    parallel_config,
    parallel_fields,
    parallel_start,
)
from pipeline.distill.prompts import SENTINEL, HeldOutFilter, read_prompts, read_transcripts
from pipeline.distill.settings import ANSWER_TOKENS, LENGTH, ROWS, START_SHARE, DistillSettings, data_key
from pipeline.distill.train import InitialDraft, TargetTables, Trainer, TrainingSettings, has_bfloat16
from pipeline.errors import InputError
from pipeline.files.atomic import write_atomic
from pipeline.models.draft_kind import DRAFT_KINDS
from pipeline.models.eagle3 import fitted, read_config
from pipeline.models.families import config_of
from pipeline.models.quantisation import without_quantisation
from pipeline.models.weights import D2T, EMBEDDING, HEAD
from pipeline.runtime.text import Text
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.tokenizer import tokenizer_files
from pipeline.sources.values import read_tensor
from pipeline.sources.weights import weights
from pipeline.speculation import block_chains, chains, model_chains
from pipeline.validate.prompts import Prompt, recipe_prompts

MASKED_DEPTHS = 4
"""Draft tokens in a row that a P-EAGLE head learns."""

SHORTEST = 4
"""Sequences with a shorter answer, in tokens, are dropped."""

SAME_STATES = 0.1
"""Largest relative difference of hidden states on disk from the target's; rounding causes a tenth of it."""


@dataclass
class Job:
    """A target, its data folder, the draft to train further if there is one, and the counts of the data.

    `taps` are the layers whose inputs the data has, `vocab` is the number of tokens that the draft may propose.
    """

    settings: DistillSettings
    target: Checkpoint
    taps: tuple[int, ...]
    vocab: int
    start: Checkpoint | None = None
    counts: TextCounts = field(default_factory=TextCounts)

    @cached_property
    def folder(self) -> Path:
        """Folder of the data and of saved trainings."""
        return self.settings.cache / "distill" / data_key(self.settings, self.target.revision, self.taps)

    @property
    def new_vocabulary(self) -> bool:
        """Whether a draft that is trained further gets another vocabulary; it keeps its rows of common tokens."""
        return self.start is not None and self.settings.draft_vocab is not None

    @property
    def becomes_parallel(self) -> bool:
        """Whether an EAGLE-3 head is trained further as a P-EAGLE head."""
        return self.start is not None and self.start.config.draft_kind.method != self.settings.method

    @property
    def start_share(self) -> float | None:
        """Share of the start in the result: by default half, and none in a head of another kind; None without start."""
        if self.start is None or self.settings.start_share is not None:
            return self.settings.start_share
        return 0.0 if self.becomes_parallel else START_SHARE

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
        """The recipe's own prompts, for measurements only."""
        return recipe_prompts(self.settings.recipe, self.settings.base)

    @cached_property
    def held_out_filter(self) -> HeldOutFilter:
        """The filter that excludes them from training."""
        return HeldOutFilter(prompt.text for prompt in self.evaluated)

    @cached_property
    def writer(self) -> Writer:
        """The target, loaded to write."""
        return Writer(self.target, self.settings.recipe.target.dtype, ROWS, LENGTH, self.taps, self.settings.device)

    @cached_property
    def config_json(self) -> dict[str, Any]:
        """The draft's `config.json`."""
        settings = self.settings
        if self.start is not None and self.start.config.eagle3 is not None:
            further = continued_config(self.target, self.start, self.vocab)
            return further | (parallel_fields(self.target, 1 + len(settings.layers)) if self.becomes_parallel else {})
        if self.start is not None:
            stored = without_quantisation(self.start.config_json)
            own = {key: value for key, value in stored.items() if key != "shares_embedding"}
            return own | {"draft_vocab_size": self.vocab}
        if settings.method == "draft_model":
            return model_config(self.target, self.vocab, settings.layers)
        if settings.method == "p_eagle":
            return parallel_config(self.target, self.vocab, self.taps, len(settings.layers))
        if settings.method == "dflash":
            verifier = hub_name(settings.recipe.target.source)
            return block_config(self.target, self.vocab, self.taps, len(settings.layers), verifier)
        return head_config(self.target, self.vocab, self.taps)

    def write_data(self) -> None:
        """Write parts until the data has as many answer tokens as the settings say, or the given prompts end."""
        settings, log = self.settings, self.settings.log
        given = read_prompts(settings.prompts) if settings.prompts else []
        transcripts = self._transcripts(settings.transcripts) if settings.transcripts else []
        for folder in settings.text:
            self._check_text(folder)
        if transcripts:
            write_transcripts(self.folder / "data", "given", transcripts, self.writer)
        prompts = Prompts(self.text, self.held_out_filter, given, settings.seed)
        number, progress = 0, TextProgress(log, settings.progress, settings.tokens, self._count())
        log(f"data folder: {self.folder / 'data'}")
        while self._count() < settings.tokens:
            if given and number * PART >= len(given):
                break
            write_part(self.folder / "data", number, PART, self.writer, prompts, ANSWER_TOKENS, progress)
            number += 1
            progress.end_part(self._count())
        settings.progress(settings.tokens, settings.tokens, 0.0)

    def sequences(self) -> list[Conversation]:
        """Return all sequences of all parts that may be trained on, given the prompts of the gates as they are now.

        Raises:
            InputError: no such sequences.

        """
        written = (s for path in (*self._parts(), *self._given()) for s in read_part(path))
        usable = [s for s in written if len(s.tokens) - s.prompt >= SHORTEST and self.held_out_filter(self._prompt(s))]
        if not usable:
            what = "no usable sequences: prompts are too long or of the gates, or answers are too short"
            raise InputError(what, where=str(self.folder / "data"), fix="use other prompts: --prompts FILE")
        return usable

    def held_out(self) -> dict[str, list[Conversation]]:
        """Return greedy answers to the recipe's prompts, by class."""
        writings = [
            Writing(self.text.encode_prompt(p.text)[-LENGTH // 2 :], ANSWER_TOKENS, 0.0, i)
            for i, p in enumerate(self.evaluated)
        ]
        by_class: dict[str, list[Conversation]] = {}
        for written in sorted(self.writer.write(writings), key=lambda w: w.writing.seed):
            tokens = torch.tensor(written.tokens, dtype=torch.int32)
            sequence = Conversation(tokens, len(written.writing.tokens), written.taps_TX, written.last_TH)
            by_class.setdefault(self.evaluated[written.writing.seed].kind, []).append(sequence)
        return by_class

    def ids(self, sequences: Sequence[Conversation]) -> Tensor:
        """Return the target ids of the reduced vocabulary, ascending int64: the start's, or the most frequent."""
        if self.start is not None and not self.new_vocabulary:
            return _ids_of(self.start)
        written = (s.tokens[s.prompt :] for s in sequences)
        return frequent(written, self.vocab, self.target.config.eos_ids)

    def trainer(self, sequences: Sequence[Conversation]) -> Trainer:
        """Return a trainer at the draft's initial weights, or at the last state that an interrupted run saved."""
        ids, device = self.ids(sequences), self.settings.device
        refs = weights(self.target)
        embedding = read_tensor(refs[EMBEDDING]).float().to(device)
        head = embedding if self.target.config.tied else read_tensor(refs[HEAD]).float().to(device)
        folder, device_ids = self.folder / self._name(sequences, ids), ids.to(device)
        tables = TargetTables(embedding, head[device_ids], device_ids)
        return Trainer(self._initial(ids), tables, self._training_settings(), folder, self.settings.log)

    def _training_settings(self) -> TrainingSettings:
        settings = self.settings
        training = TrainingSettings(
            steps=settings.steps, objective=settings.objective, seed=settings.seed,
            bfloat16=has_bfloat16(settings.device),
        )  # fmt: skip
        if settings.method == "draft_model":  # later draft tokens need no separate training
            return replace(training, single=1.0)
        if settings.method == "p_eagle":  # which learns masks from the first step, as many as are drafted
            return replace(training, single=0.0, depths=MASKED_DEPTHS)
        if settings.method == "dflash":
            return block_training(training)
        # Steps on one token alone would first unlearn the later tokens of a trained head.
        return training if self.start is None else replace(training, single=0.0)

    def _initial(self, ids: Tensor) -> InitialDraft:
        """Return the draft before its training, from the target's weights or from those of `start`."""
        if self.settings.method == "draft_model":
            config = config_of(self.config_json, "draft")
            guesses, new = model_chains.guesses, layers_of(self.target, config, self.settings.layers, ids)
        elif self.settings.method == "dflash":
            config = read_block(self.config_json, self.target)
            new = initial(self.target, config, ids, self.settings.seed, self.settings.layers)
            guesses = block_chains.guesses
        else:
            config = read_config(self.config_json, "head")
            layers = self.settings.layers
            if self.becomes_parallel:
                config, layers = fitted(self.target.config, config, "head"), (self.target.config.layers - 1, *layers)
            elif self.start is not None:
                config = replace(self.start.config, draft_vocab=self.vocab)
            guesses, new = chains.guesses, initial(self.target, config, ids, self.settings.seed, layers)
        if self.start is None:
            return InitialDraft(guesses, config, new)
        refs = weights(self.start)
        own = [name for name in new if name in refs or not self.becomes_parallel]
        trained = {name: read_tensor(refs[name]).float() for name in own}
        if self.becomes_parallel:
            trained = parallel_start(trained, new)
        if self.new_vocabulary:
            trained[HEAD] = _rows(trained[HEAD], _ids_of(self.start), new[HEAD], ids)
        return InitialDraft(guesses, config, trained)

    def _name(self, sequences: Sequence[Conversation], ids: Tensor) -> str:
        """Return the name of a training: a digest of all its inputs except settings, and the start."""
        digest = hashlib.sha256(ids.numpy().tobytes())
        for s in sequences:
            digest.update(f"{s.prompt} {len(s.tokens)} ".encode() + s.tokens.numpy().tobytes())
        name = f"{self.settings.objective}-{self.vocab}-{digest.hexdigest()[:16]}"
        if DRAFT_KINDS[self.settings.method].parallel:
            name += f"-{self.settings.method.replace('_', '-')}"
        if self.settings.method != "eagle3":
            name += "-layers-" + "-".join(map(str, self.settings.layers))
        return name if self.start is None else f"{name}-from-{self.start.revision[-8:]}"

    def _transcripts(self, path: Path) -> list[Transcript]:
        """Return the transcripts in a file whose prompts may be trained on, as tokens."""
        pairs = read_transcripts(path)
        allowed = ((prompt, answer) for prompt, answer in pairs if self.held_out_filter(prompt))
        return [
            Transcript(self.text.encode_prompt(prompt), self.text.encode(answer, special=False))
            for prompt, answer in allowed
        ]

    def _prompt(self, sequence: Conversation) -> str:
        """Return the user's message in a sequence."""
        before, after = self._template
        text = self.text.decode(sequence.tokens[: sequence.prompt].tolist())
        return text.removeprefix(before).removesuffix(after)

    @cached_property
    def _template(self) -> tuple[str, str]:
        """Text around the user's message, decoded without special tokens."""
        parts = (self.text.chat_text(SENTINEL) if self.text.has_chat else "").partition(SENTINEL)
        before, _, after = (self.text.decode(self.text.encode(part, special=False)) for part in parts)
        return before, after

    def _parts(self) -> list[Path]:
        return _parts_in(self.folder / "data")

    def _given(self) -> list[Path]:
        """Return the parts of earlier runs; a folder that is given twice, or is this run's own, counts once."""
        own = (self.folder / "data").resolve()
        folders = dict.fromkeys(folder.resolve() for folder in self.settings.text)
        return [path for folder in folders if folder != own for path in _parts_in(folder)]

    def _check_text(self, folder: Path) -> None:
        """Raise an error if the hidden states of a folder's first sequence differ from the target's."""
        parts = _parts_in(folder)
        for path in parts:
            if not is_part(path):
                raise InputError("not a part of training data, or damaged", where=str(path), fix="remove this file")
        stored = next((sequence for path in parts for sequence in read_part(path)), None)
        if stored is None:
            raise InputError("no training data in this folder", where=str(folder), fix="use a run's data folder")
        tokens = stored.tokens.tolist()
        (written,) = self.writer.read([Transcript(tokens[: stored.prompt], tokens[stored.prompt :])])
        for old, new in ((stored.taps_TX, written.taps_TX), (stored.last_TH, written.last_TH)):
            if old.shape != new.shape or (old.float() - new.float()).norm() > SAME_STATES * new.float().norm():
                taps = ", ".join(map(str, self.taps))
                what = f"hidden states differ from those of the target before layers {taps}"
                raise InputError(what, where=str(folder), fix="use data that was written for this target")

    def _count(self) -> int:
        """Update the counts from the parts' headers; return the answer tokens."""
        self.counts = TextCounts()
        for path in (*self._parts(), *self._given()):
            self.counts = self.counts.plus(count_part(path))
        return self.counts.answer_tokens


def _parts_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _ids_of(draft: Checkpoint) -> Tensor:
    """Return the target ids of a draft's vocabulary, ascending int64."""
    offsets = read_tensor(weights(draft)[D2T])
    return torch.arange(len(offsets)) + offsets.long()


def _rows(old_VH: Tensor, old_ids_V: Tensor, new_UH: Tensor, ids_U: Tensor) -> Tensor:
    """Return the rows of `ids_U`: from `old_VH` where it has them, else from `new_UH`."""
    index_U = torch.searchsorted(old_ids_V, ids_U).clamp(max=len(old_ids_V) - 1)
    kept_U1 = (old_ids_V[index_U] == ids_U)[:, None]
    return torch.where(kept_U1, old_VH[index_U], new_UH)
