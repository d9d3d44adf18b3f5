"""The goldens of one model, cached by content: picks the reference that computes those that the cache lacks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import transformers
from safetensors.torch import load_file
from torch import Tensor

from pipeline.cache.backed import BackedCache
from pipeline.cache.local import Cache
from pipeline.cache.remote import Remote
from pipeline.models.draft_kind import DraftMethod
from pipeline.progress import Log
from pipeline.sources.checkpoint import Checkpoint
from pipeline.validate.reference.dflash import DFlashReference, DSparkReference
from pipeline.validate.reference.eagle3 import Eagle3Reference
from pipeline.validate.reference.golden import Golden, pack, unpack
from pipeline.validate.reference.layers import Reference, Taps
from pipeline.validate.reference.mtp import MtpReference
from pipeline.validate.reference.products import WideProducts
from pipeline.validate.reference.routes import digest

REFERENCES: dict[DraftMethod, type[Reference]] = {
    "draft_model": Reference,
    "eagle3": Eagle3Reference,
    "p_eagle": Eagle3Reference,
    "mtp": MtpReference,
    "dflash": DFlashReference,
    "dspark": DSparkReference,
}
"""The reference of each kind of draft; a target's is that of a draft model."""

FORMAT = 1
"""Part of every key: raise it when a golden's content changes."""

ROUTES = 1
"""The same for models with experts alone."""


class GoldenStore(Protocol):
    """Where goldens are kept by key: a local cache, or one with a shared cache behind it."""

    def get(self, key: str) -> Path | None:
        """Return the file under `key`, or None."""
        ...

    def put(self, key: str, data: bytes) -> Path:
        """Store a golden."""
        ...


def golden_store(cache: Path, remote: Remote | None, log: Log) -> BackedCache:
    """Return the goldens of a local cache, and of a shared one behind it."""
    versions = {"transformers": transformers.__version__}  # a part of every key as well
    return BackedCache(Cache(cache, "goldens"), remote.open("goldens", log) if remote else None, versions)


@dataclass
class Goldens:
    """The reference of one model of a pair. `computed` and `cached` count sequences.

    `narrow` is what its matrices are stored as, if narrower than the dtype, and `target_narrow` what those of the
    target are, whose states or embedding it may read: both runs then have the rounded weights. `taps` is shared by the
    references of a target and of a head that reads its states, so that the target runs once.
    """

    checkpoint: Checkpoint
    target: Checkpoint
    dtype: str
    cache: GoldenStore
    log: Log
    narrow: str | None = None
    target_narrow: str | None = None
    taps: Taps | None = None
    computed: int = 0
    cached: int = 0
    _known: dict[str, Golden] = field(default_factory=dict)

    def of(self, sequences: Sequence[list[int]], experts: Sequence[Tensor | None] = ()) -> list[Golden]:
        """Return goldens of token sequences; missing ones are computed together, in one pass over the layers.

        `experts` int [T, L, C] of each sequence are those that the reference follows; None: its own choices.
        """
        runs = list(zip(sequences, list(experts) or [None] * len(sequences), strict=True))
        keys = [self._key(tokens, given) for tokens, given in runs]
        missing = {key: run for key, run in zip(keys, runs, strict=True) if self._load(key) is None}
        self.cached += len(keys) - len(missing)
        if missing:
            model = self._reference()
            role = "target" if self.checkpoint is self.target else "draft"
            weights = f" with {self.narrow} weights" if self.narrow else ""
            along = " along the artifact's experts" if experts else ""
            self.log(f"  reference of the {role}{weights}{along}: {len(missing)} sequences, layer by layer")
            goldens = model.goldens([run[0] for run in missing.values()], [run[1] for run in missing.values()])
            with WideProducts():
                for key, golden in zip(missing, goldens, strict=True):
                    self.cache.put(key, pack(golden))
                    self._known[key] = golden
            self.computed += len(missing)
        return [self._known[key] for key in keys]

    def _reference(self) -> Reference:
        reference = REFERENCES[self.checkpoint.config.draft_kind.method]
        return reference(self.checkpoint, self.target, self.dtype, self.narrow, self.target_narrow, self.taps)

    def _load(self, key: str) -> Golden | None:
        if key not in self._known:
            path = self.cache.get(key)
            if path is not None:
                self._known[key] = unpack(load_file(path))
        return self._known.get(key)

    def _key(self, tokens: list[int], experts: Tensor | None = None) -> str:
        files = sorted((n, d.sha256) for c in (self.checkpoint, self.target) for n, d in c.files.items())
        facts = [FORMAT, files, self.checkpoint.layers, tokens, self.dtype, transformers.__version__]
        unlisted = [c.revision for c in (self.checkpoint, self.target) if c.remote.keys() - c.files.keys()]
        facts += [{"revisions": unlisted}] if unlisted else []  # of weights whose store lists no sha256
        head = self.checkpoint.config.eagle3  # a recipe can change how it is read, and Tandem's rules can
        facts += [{"head": asdict(self.checkpoint.config)}] if head else []
        facts += [self.narrow] if self.narrow else []
        facts += [{"target": self.target_narrow}] if self.target_narrow != self.narrow else []
        has_experts = self.checkpoint.config.expert_layers or (head and self.target.config.expert_layers)
        facts += [{"routes": ROUTES, "experts": digest(experts)}] if has_experts else []
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
