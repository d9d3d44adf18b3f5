"""What transformers computes for a sequence, reduced to what the gates compare, cached by content.

Two runs, side by side, on the weights as the recipe's dtype holds them. The *baseline* is the same mathematics one
precision up (float32 for bfloat16 and float16, float64 for float32); *noise* is the recipe's own dtype, and shows how
far a correct implementation strays. Layers are read, run over every sequence and dropped one at a time, so a model
needs the memory of one layer and of its hidden states, not of its weights.

A golden is bounded whatever the vocabulary: logits at the baseline's best ranks, and a random projection of all.

Shapes: T tokens of a sequence, N recorded ids, V vocabulary, H hidden, R rows of the projection.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pipeline.cache.local import Cache
from pipeline.graphs.dtypes import SAFETENSORS, torch_dtype
from pipeline.models.int8 import rounded
from pipeline.models.weights import EMBEDDING, HEAD, NORM
from pipeline.progress import Log
from pipeline.sources.checkpoint import Checkpoint
from pipeline.sources.tensors import TensorRef
from pipeline.sources.weights import weights

FORMAT = 1
"""Part of every key: raise it when a golden's content changes."""

RANKS = (*range(50), *range(50, 1000, 10))
"""Ranks of the baseline whose logits are recorded: the first 50, then every tenth up to 1000."""

PROJECTIONS = 32
CACHE_PROJECTIONS = 2
CACHE_NAMES = ("cache", "past_key_values", "past_key_value")
"""What versions of transformers call the cache that a layer is given."""

TOKENS_AT_ONCE = 256
HEAD_ROWS = 16384


@dataclass(frozen=True)
class Summary:
    """Logits of a sequence, reduced. `values` [T, N] at the golden's ids, `projected` [T, R], `lse`, `best` [T]."""

    values: Tensor
    projected: Tensor
    lse: Tensor
    best: Tensor

    def cut(self, tokens: int) -> Summary:
        """The first tokens only."""
        return Summary(*(tensor[:tokens] for tensor in vars(self).values()))


@dataclass(frozen=True)
class Golden:
    """Baseline and noise of one sequence. `ids` int32 [T, N] by descending baseline logit.

    `caches` and `caches_noise`, float32 [T, layers, 2, R'], are projections of every layer's keys and values; of an
    EAGLE-3 head there are T - 1.
    """

    ids: Tensor
    baseline: Summary
    noise: Summary
    caches: Tensor
    caches_noise: Tensor

    def cut(self, tokens: int) -> Golden:
        """The first tokens only: attention is causal, so they are the same in a longer sequence."""
        held = tokens - (len(self.ids) - len(self.caches))
        caches = self.caches[:held], self.caches_noise[:held]
        return Golden(self.ids[:tokens], self.baseline.cut(tokens), self.noise.cut(tokens), *caches)


@dataclass
class Goldens:
    """The reference of one model of a pair. `computed` and `found` count sequences.

    `narrow` is what its matrices are stored as, if narrower than the dtype, and `target_narrow` what those of the
    target are, whose states or embedding it may read: both runs then have the rounded weights.
    """

    checkpoint: Checkpoint
    target: Checkpoint
    dtype: str
    cache: Cache
    log: Log
    narrow: str | None = None
    target_narrow: str | None = None
    computed: int = 0
    found: int = 0
    _known: dict[str, Golden] = field(default_factory=dict)

    def of(self, sequences: Sequence[list[int]]) -> list[Golden]:
        """Goldens of token sequences; those that the cache lacks are computed together, in one pass over the layers."""
        keys = [self._key(tokens) for tokens in sequences]
        missing = {key: tokens for key, tokens in zip(keys, sequences, strict=True) if self._load(key) is None}
        self.found += len(keys) - len(missing)
        if missing:
            model = self._reference()
            self.log(f"  reference of {len(missing)} sequences, {model.layers} layers one at a time")
            for key, golden in zip(missing, model.goldens(list(missing.values())), strict=True):
                self.cache.put(key, _pack(golden))
                self._known[key] = golden
            self.computed += len(missing)
        return [self._known[key] for key in keys]

    def _reference(self) -> Reference:
        given = self.checkpoint, self.target, self.dtype, self.narrow, self.target_narrow
        if self.checkpoint.config.eagle3 is None:
            return Reference(*given)
        from pipeline.validate.reference.eagle3 import Eagle3Reference

        return Eagle3Reference(*given)

    def _load(self, key: str) -> Golden | None:
        if key not in self._known:
            path = self.cache.get(key)
            if path is not None:
                self._known[key] = _unpack(load_file(path))
        return self._known.get(key)

    def _key(self, tokens: list[int]) -> str:
        files = sorted((n, d.sha256) for c in (self.checkpoint, self.target) for n, d in c.files.items())
        facts = [FORMAT, files, self.checkpoint.layers, tokens, self.dtype, transformers.__version__]
        facts += [self.narrow] if self.narrow else []
        facts += [{"target": self.target_narrow}] if self.target_narrow != self.narrow else []
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def above(dtype: str) -> torch.dtype:
    """The precision of the baseline."""
    return torch.float64 if dtype == "float32" else torch.float32


def summary(logits_TV: Tensor, ids_TN: Tensor) -> Summary:
    """Reduce logits of any precision to what goldens record."""
    projected = logits_TV.double() @ projection(logits_TV.shape[-1])
    wide = logits_TV.double() if logits_TV.dtype == torch.float64 else logits_TV.float()
    values = wide.gather(-1, ids_TN.long())
    return Summary(values, projected, wide.logsumexp(-1), logits_TV.argmax(-1).int())


@lru_cache(maxsize=4)
def projection(vocab: int) -> Tensor:
    """Scaled random signs [V, R]: the squared length of a projected difference is, on average, its mean square.

    Johnson and Lindenstrauss 1984, with the signs of Achlioptas 2003: no entry of the vocabulary escapes it.
    """
    signs = torch.randint(0, 2, (vocab, PROJECTIONS), generator=torch.Generator().manual_seed(vocab))
    return (signs.double() * 2 - 1) / (PROJECTIONS * vocab) ** 0.5


class Reference:
    """A checkpoint run by transformers' own modules, one layer in memory at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        target: Checkpoint,
        dtype: str,
        narrow: str | None = None,
        target_narrow: str | None = None,
    ) -> None:
        self.checkpoint, self.target = checkpoint, target
        self.narrow, self.target_narrow = narrow, target_narrow
        self.dtype_name = dtype
        self.dtype = torch_dtype(dtype)
        self.kinds = (above(dtype), self.dtype)
        self._refs = weights(checkpoint)
        shared = checkpoint.config.shares_embedding
        self._embedding = (weights(target) if shared else self._refs)[EMBEDDING]
        self._embedding_narrow = target_narrow if shared else narrow

    @property
    def layers(self) -> int:
        """Layers that are read."""
        return self.checkpoint.config.layers

    @torch.no_grad()
    def goldens(self, sequences: list[list[int]]) -> Iterator[Golden]:
        """Run the layers over all sequences, then yield a golden for each."""
        runs = self.run_layers(sequences)
        caches = [[torch.stack(run.cache.layers, dim=1) for run in runs[kind]] for kind in self.kinds]
        baseline, noise = (list(self._normed(runs.pop(kind), kind)) for kind in self.kinds)
        for high, low, keys, keys_noise in zip(baseline, noise, *caches, strict=True):
            yield self.golden(high, low, keys, keys_noise)

    def run_layers(
        self, sequences: list[list[int]], watch: Callable[[int, torch.dtype, int, Tensor], None] | None = None
    ) -> dict[torch.dtype, list[Recorder]]:
        """Run all layers in both precisions; `watch` sees layer, precision, sequence and the layer's input."""
        model = self._skeleton()
        runs = {kind: [self._start(model, tokens, kind) for tokens in sequences] for kind in self.kinds}
        for index, layer in enumerate(self._layers):
            prefix = f"model.layers.{index}."
            state = {n.removeprefix(prefix): self.read(r) for n, r in self._refs.items() if n.startswith(prefix)}
            for kind, started in runs.items():
                layer.load_state_dict({name: tensor.to(kind) for name, tensor in state.items()}, assign=True)
                for number, run in enumerate(started):
                    if watch is not None:
                        watch(index, kind, number, run.hidden)
                    out = layer(run.hidden, **run.options)
                    run.hidden = out[0] if isinstance(out, tuple) else out
            layer.to("meta")
        return runs

    def _skeleton(self) -> Any:
        """Make transformers' model without weights; its layers are taken out and run one by one."""
        fields = {k: v for k, v in self.checkpoint.config_json.items() if k not in ("model_type", "layer_types")}
        fields |= {"num_hidden_layers": self.checkpoint.config.layers}
        config = transformers.AutoConfig.for_model(self.checkpoint.config_json["model_type"], **fields)
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config, attn_implementation="sdpa").eval()
        self._layers = model.layers
        model.layers = nn.ModuleList([Recorder()])
        model.norm, self._norm = nn.Identity(), model.norm
        model.rotary_emb = type(model.rotary_emb)(config=config)
        return model

    def _start(self, model: Any, tokens: list[int], kind: torch.dtype) -> Recorder:
        """Embed a sequence and record what the model hands to its layers: mask, positions, rotary tables."""
        recorder = Recorder()
        model.layers[0] = recorder
        model(inputs_embeds=self.embed(tokens)[None].to(kind), use_cache=False)
        recorder.options[next(name for name in CACHE_NAMES if name in recorder.options)] = recorder.cache
        return recorder

    def embed(self, tokens: list[int]) -> Tensor:
        """Embeddings [T, H] as the recipe's dtype holds them."""
        last = self._embedding.shape[0] - 1  # as the graphs do where a draft's vocabulary is padded less
        rows = (self._embedding.rows(min(t, last), min(t, last) + 1) for t in tokens)
        return torch.stack([self._read(row, self._embedding_narrow)[0] for row in rows])

    def _normed(self, runs: list[Recorder], kind: torch.dtype) -> Iterator[Tensor]:
        """Normalised hidden states [T, H] of each sequence, which is all that remains of a run."""
        self._norm.load_state_dict({"weight": self.read(self._refs[NORM]).to(kind)}, assign=True)
        for run in runs:
            yield self._norm(run.hidden)[0]

    def golden(self, high_TH: Tensor, low_TH: Tensor, caches: Tensor, caches_noise: Tensor) -> Golden:
        """What is kept of normalised hidden states and projected caches in both precisions."""
        ids, parts = [], ([], [])  # type: tuple[list[Tensor], tuple[list[Summary], list[Summary]]]
        for start in range(0, len(high_TH), TOKENS_AT_ONCE):
            chosen = None
            for hidden, kept in zip((high_TH, low_TH), parts, strict=True):
                logits = self._head(hidden[start : start + TOKENS_AT_ONCE])
                if chosen is None:
                    chosen = recorded_ids(logits)
                    ids.append(chosen)
                kept.append(summary(logits, chosen))
        return Golden(torch.cat(ids), _joined(parts[0]), _joined(parts[1]), caches, caches_noise)

    def _head(self, hidden_TH: Tensor) -> Tensor:
        """Logits [T, V], float64 or float32: accumulated in at least float32, as Tandem does in every dtype."""
        tied = self.checkpoint.config.tied
        ref = self._embedding if tied else self._refs[HEAD]
        wide = hidden_TH.to(torch.promote_types(hidden_TH.dtype, torch.float32))
        rows = range(0, ref.shape[0], HEAD_ROWS)
        narrow = self._embedding_narrow if tied else self.narrow
        blocks = (self._read(ref.rows(r, min(r + HEAD_ROWS, ref.shape[0])), narrow).to(wide.dtype) for r in rows)
        return torch.cat([wide @ block.T for block in blocks], dim=-1)

    def read(self, ref: TensorRef) -> Tensor:
        """A tensor as the recipe's dtype holds it; a matrix stored as int8 as what that stands for, float32."""
        return self._read(ref, self.narrow)

    def _read(self, ref: TensorRef, narrow: str | None) -> Tensor:
        tensor = read_tensor(ref)
        if narrow == "int8" and tensor.dim() == 2:
            return rounded(tensor)
        return tensor.to(self.dtype)


def read_tensor(ref: TensorRef) -> Tensor:
    """One tensor of a checkpoint, read now."""
    with ref.file.open("rb") as file:
        file.seek(ref.offset)
        data = bytearray(file.read(ref.nbytes))
    return torch.frombuffer(data, dtype=SAFETENSORS[ref.dtype].as_torch()).view(ref.shape)


class Recorder(nn.Module):
    """Stands where the layers are and keeps what they would be given."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.empty(0)
        self.cache = _Keys()
        self.options: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        """Record and pass on."""
        self.hidden, self.options = hidden_states, options
        return hidden_states


class _Keys:
    """What a layer takes for a cache: keeps projections of keys and values and hands both back."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Shapes: [1, heads, T, D]."""
        self.layers.append(torch.stack([project_cache(keys[0]), project_cache(values[0])], dim=1))
        return keys, values


def project_cache(cache_HTD: Tensor) -> Tensor:
    """Random projection of one layer's keys or values at each position, float32 [T, R']."""
    heads, tokens, dim = cache_HTD.shape
    flat = cache_HTD.transpose(0, 1).reshape(tokens, heads * dim)
    return (flat.double() @ projection(heads * dim)[:, :CACHE_PROJECTIONS]).float()


def recorded_ids(logits_TV: Tensor) -> Tensor:
    """Vocabulary ids at `RANKS`, int32 [T, N]."""
    vocab = logits_TV.shape[-1]
    order = logits_TV.topk(min(RANKS[-1] + 1, vocab), dim=-1).indices
    return order[:, [rank for rank in RANKS if rank < vocab]].int()


def _joined(parts: list[Summary]) -> Summary:
    fields = ("values", "projected", "lse", "best")
    return Summary(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))


def _pack(golden: Golden) -> bytes:
    tensors = {"ids": golden.ids, "caches": golden.caches, "caches_noise": golden.caches_noise}
    for name, part in (("baseline", golden.baseline), ("noise", golden.noise)):
        tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in vars(part).items()}
    return save(tensors)


def _unpack(tensors: dict[str, Tensor]) -> Golden:
    fields = ("values", "projected", "lse", "best")
    high, low = (Summary(*(tensors[f"{name}.{key}"] for key in fields)) for name in ("baseline", "noise"))
    return Golden(tensors["ids"], high, low, tensors["caches"], tensors["caches_noise"])
