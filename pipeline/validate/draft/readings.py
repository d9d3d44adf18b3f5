"""Other readings of a head's file: taps one layer up or down, switches of norms, its vocabulary and RoPE.

Each comes with the recipe's key that selects it. Pure; computes no logits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipeline.models.config import Eagle3, ModelConfig
from pipeline.models.eagle3 import fitted, with_rope_of
from pipeline.models.eagle3_writers import RECIPE, usual_taps
from pipeline.models.families import config_of
from pipeline.sources.checkpoint import Checkpoint


@dataclass(frozen=True)
class Reading:
    """One way to read a head: its config, and the key and value of the recipe's `draft` that select it."""

    config: ModelConfig
    key: str = ""
    value: Any = None
    vocabulary: str = "d2t"
    is_usual: bool = True
    """Whether tools and people mistake files for it: all taps one layer off, but not one of them alone."""

    @property
    def head(self) -> Eagle3:
        """How the head is read."""
        assert self.config.eagle3 is not None
        return self.config.eagle3

    @property
    def line(self) -> str:
        """What a recipe says under `draft` to select it."""
        value = self.value if isinstance(self.value, str) else json.dumps(self.value)
        return f"{self.key}: {value}"


def current(draft: Checkpoint) -> Reading:
    """Return the reading that a build uses."""
    told = draft.config_json.get(RECIPE) or {}
    return Reading(draft.config, vocabulary=told.get("vocabulary") or "d2t")


def others(target: Checkpoint, draft: Checkpoint, *, has_t2d: bool) -> list[Reading]:
    """Return all other readings of a head, each once; the module of a target has none."""
    head = draft.config.eagle3
    if head is not None and head.mtp:
        return []
    found = [*_taps(target.config, draft), *_switches(draft), *_ropes(target, draft)]
    if has_t2d and draft.config.draft_vocab is not None:
        other = "d2t" if current(draft).vocabulary == "t2d" else "t2d"
        found.append(Reading(draft.config, "vocabulary", other, other))
    unique: dict[tuple[ModelConfig, str], Reading] = {}
    for reading in found:
        unique.setdefault(_bare(reading), reading)
    unique.pop(_bare(current(draft)), None)
    return list(unique.values())


def _bare(reading: Reading) -> tuple[ModelConfig, str]:
    """Return what decides a reading's logits: the config without notes of the file, and the vocabulary."""
    return replace(reading.config, eagle3=replace(reading.head, written=None)), reading.vocabulary


def _taps(target: ModelConfig, draft: Checkpoint) -> Iterator[Reading]:
    """Yield other taps: the ids read the other way, all one up or down, each alone one up or down, the usual ones."""
    head = draft.config.eagle3
    assert head is not None
    if head.reads_output:
        return
    taps, written = head.taps, head.written
    if written is not None:
        ways = {"inputs": written.ids, "outputs": tuple(k + 1 for k in written.ids)}
        yield from (_tapped(draft, "taps", word, ids) for word, ids in ways.items() if _exist(ids, target))
    moved = [tuple(tap + by for tap in taps) for by in (1, -1)]
    moved += [usual_taps(target.layers)] if len(taps) == len(usual_taps(target.layers)) else []
    yield from (_tapped(draft, "taps", list(ids), ids) for ids in moved if _exist(ids, target))
    single = [tuple(t + by if i == n else t for i, t in enumerate(taps)) for n in range(len(taps)) for by in (1, -1)]
    alone = (_tapped(draft, "taps", list(ids), ids) for ids in single if _exist(ids, target))
    yield from (replace(reading, is_usual=False) for reading in alone)


def _tapped(draft: Checkpoint, key: str, value: Any, taps: tuple[int, ...]) -> Reading:
    head = draft.config.eagle3
    assert head is not None
    return Reading(replace(draft.config, eagle3=replace(head, taps=taps)), key, value, current(draft).vocabulary)


def _exist(taps: tuple[int, ...], target: ModelConfig) -> bool:
    return list(taps) == sorted(set(taps)) and taps[0] >= 0 and taps[-1] <= target.layers


def _switches(draft: Checkpoint) -> Iterator[Reading]:
    """Yield each switch of a norm the other way."""
    now = current(draft)
    residual, output = not now.head.norm_before_residual, not now.head.norm_output
    heads = [
        ("norm_before_residual", residual, replace(now.head, norm_before_residual=residual)),
        ("norm_output", output, replace(now.head, norm_output=output)),
    ]
    count = {"eagle3": 2, "p_eagle": 1}.get(draft.config.draft_kind.method, 0)  # a P-EAGLE head feeds nothing back
    for name, value, head in heads[:count]:
        yield Reading(replace(draft.config, eagle3=head), name, value, now.vocabulary)
    if draft.config.draft_kind.blocks:
        other = not now.head.from_anchor
        head = replace(now.head, from_anchor=other)
        yield Reading(replace(draft.config, eagle3=head), "sample_from_anchor", other, now.vocabulary)


def _ropes(target: Checkpoint, draft: Checkpoint) -> Iterator[Reading]:
    """Yield the head's rotary embedding without scaling, and that of the target."""
    for word in ("default", "target"):
        told = {**(draft.config_json.get(RECIPE) or {}), "rope": word}
        config_json = with_rope_of(target.config_json, draft.config_json | {RECIPE: told})
        config = fitted(target.config, config_of(config_json, str(draft.root)))
        kept = replace(config, shares_embedding=draft.config.shares_embedding)
        yield Reading(replace(kept, eagle3=draft.config.eagle3), "rope", word, current(draft).vocabulary)


def layers_of(readings: list[Reading]) -> tuple[int, ...]:
    """Return every layer that one of these readings taps, ascending."""
    return tuple(sorted({tap for reading in readings for tap in reading.head.taps}))
