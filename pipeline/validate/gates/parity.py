"""Gate 1: are the compiled models numerically the models? Teacher-forced logits of the shipped `score` graphs.

Three-way (see `goldens.py`): the baseline is transformers one precision up, noise is transformers in the recipe's
dtype, the artifact is judged. Two kinds of bound must both hold. The *map* bounds the largest error of the top k
logits, relative to the largest logit, whatever the dtype (the tolerances of the Neuron plugin's logit validation).
*Noise* bounds the error against what the dtype itself does to the same tokens: over all of them, over every slice (a
prompt, a stretch of positions, a graph), on each token, and in every layer's keys and values. Nothing that passes one
rescues what fails another.

Shapes: T tokens, N recorded ids, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.graphs.dtypes import torch_dtype
from pipeline.graphs.spec import GraphSpec
from pipeline.runtime.engine import Engine
from pipeline.validate.gates.limits import ATOL, FLIP_LIMIT, MAP, MAP_ALL, SLICE_TOKENS, TIE, limits
from pipeline.validate.gates.scoring import run_score
from pipeline.validate.reference.goldens import Golden, Summary, project_cache, summary

POSITION_BINS = 16


@dataclass(frozen=True)
class Sequence_:  # noqa: N801 - `Sequence` is typing's
    """Tokens to score: a prompt with its answer, or a probe that fills the cache. `prompt` tokens were given."""

    name: str
    kind: str
    tokens: list[int]
    prompt: int


@dataclass
class Parity:
    """Figures of one model, a column a quantity, a row a token."""

    model: str
    dtype: str
    rows: list[dict[str, Tensor]] = field(default_factory=list)
    layers: Tensor | None = None
    """Sums of squares, float64 [error or noise, layers, key or value]; none where ranks share the heads."""

    sequences: list[tuple[Sequence_, str]] = field(default_factory=list)

    def add(self, sequence: Sequence_, graph: str, got: Summary, golden: Golden) -> None:
        """Compare one sequence in one graph."""
        columns = _columns(got, golden, self.dtype)
        size = len(got.best)
        columns["position"] = torch.arange(size, dtype=torch.float64)
        columns["sequence"] = torch.full((size,), float(len(self.sequences)), dtype=torch.float64)
        self.rows.append(columns)
        self.sequences.append((sequence, graph))

    def add_caches(self, state: Mapping[str, Tensor], row: int, golden: Golden) -> None:
        """Compare keys and values that a sequence left in a cache row."""
        tokens, layers = golden.caches.shape[:2]
        got = torch.stack(
            [
                torch.stack(
                    [project_cache(state[f"{self.model}/{part}.{n}"][row, :, :tokens].cpu()) for part in "kv"], 1
                )
                for n in range(layers)
            ],
            dim=1,
        )
        both = torch.stack([got - golden.caches, golden.caches_noise - golden.caches]).double()
        sums = both.pow(2).sum((1, 4))
        self.layers = sums if self.layers is None else self.layers + sums

    @property
    def layers_over_noise(self) -> list[list[float]]:
        """Error over noise of every layer's keys and values, root mean square."""
        if self.layers is None:
            return []
        ratios: list[list[float]] = (self.layers[0] / self.layers[1].clamp(min=1e-300)).sqrt().tolist()
        return ratios

    @property
    def floor(self) -> float:
        """Median over tokens of the noise of the largest logits, relative."""
        return float(torch.cat([row["noise_5"] for row in self.rows]).median())

    def table(self) -> dict[str, Tensor]:
        """All tokens, float64 columns; the ones that need all of them are filled in here."""
        table = {name: torch.cat([row[name] for row in self.rows]) for name in self.rows[0]}
        floor = {k: table[f"noise_{k}"].median() for k in MAP}
        outlier = [table[f"error_{k}"] / torch.maximum(table[f"noise_{k}"], floor[k]).clamp(min=1e-300) for k in MAP]
        table["over_noise"] = torch.stack(outlier).amax(0)
        allowed = TIE * torch.maximum(table["noise_5"], floor[5])
        table["near_tie"] = table["flip"] * (table["gap_chosen"] <= allowed)
        return table

    def groups(self) -> Iterator[tuple[str, str, Tensor]]:
        """Slices of the table: kind, name, and the rows' mask."""
        table = self.table()
        index = table["sequence"].long()
        graphs = [graph for _, graph in self.sequences]
        classes = [sequence.kind for sequence, _ in self.sequences]
        names = [sequence.name for sequence, _ in self.sequences]
        for kind, labels in (("graph", graphs), ("class", classes), ("prompt", names)):
            for label in dict.fromkeys(labels):
                yield kind, label, torch.tensor([one == label for one in labels])[index]
        longest = int(table["position"].max()) + 1
        width = max(-(-longest // POSITION_BINS), 1)
        for start in range(0, longest, width):
            name = f"{start} to {min(start + width, longest) - 1}"
            yield "positions", name, (table["position"] >= start) & (table["position"] < start + width)


def error_over_noise(table: dict[str, Tensor], rows: Tensor | None = None) -> float:
    """Root mean square error over that of the noise: over recorded logits and over the whole vocabulary, the larger."""
    chosen = slice(None) if rows is None else rows
    ratios = [
        (table[f"square_error_{part}"][chosen].sum() / table[f"square_noise_{part}"][chosen].sum().clamp(min=1e-300))
        for part in ("top", "all")
    ]
    return float(torch.stack(ratios).amax().sqrt())


def failures(parity: Parity, near_tie_rate: float) -> list[str]:
    """Why this gate fails, each naming where; empty when it passes."""
    table = parity.table()
    if not bool(table["finite"].all()):
        row = int((table["finite"] == 0).nonzero()[0])
        return [f"{parity.model}: logits are not finite, first at {place(parity, table, row)}"]
    found = [
        *_over_map(parity, table),
        *_layers(parity),
        *_over_noise(parity, table),
        *_flips(parity, table, near_tie_rate),
    ]
    return [f"{parity.model}: {what}" for what in found]


def place(parity: Parity, table: dict[str, Tensor], row: int) -> str:
    """Where a token is, for a reader."""
    sequence, graph = parity.sequences[int(table["sequence"][row])]
    return f"{sequence.name}, position {int(table['position'][row])}, {graph}"


def _over_map(parity: Parity, table: dict[str, Tensor]) -> Iterator[str]:
    """Largest errors over the map. Where transformers in this dtype leaves the map itself, its worst is the measure."""
    for name, bound in (*((str(k), bound) for k, bound in MAP.items()), ("all", MAP_ALL)):
        column = table[f"error_{name}"] - table["allowed"]
        row = int(column.argmax())
        limit = max(bound, limits(parity.dtype).all * float(table[f"noise_{name}"].max()))
        if not float(column[row]) <= limit:
            yield f"top-{name} error {float(column[row]):.2e} exceeds {limit:.2g} at {place(parity, table, row)}"


def _over_noise(parity: Parity, table: dict[str, Tensor]) -> Iterator[str]:
    ratio = error_over_noise(table)
    limit = limits(parity.dtype)
    if not ratio <= limit.all:
        yield f"error is {ratio:.2f} times the noise of {parity.dtype}, over all tokens; the limit is {limit.all}"
    slices = [(error_over_noise(table, m), kind, name) for kind, name, m in parity.groups() if m.sum() >= SLICE_TOKENS]
    worst, kind, name = max(slices, default=(0.0, "", ""))
    if not worst <= limit.slice:
        yield f"error is {worst:.2f} times the noise of {parity.dtype} in {kind} {name}; the limit is {limit.slice}"
    row = int(table["over_noise"].argmax())
    over = float(table["over_noise"][row])
    if not over <= limit.token:
        where = place(parity, table, row)
        yield f"a token's error is {over:.1f} times its noise at {where}; the limit is {limit.token}"


def _layers(parity: Parity) -> Iterator[str]:
    """The first layer whose keys or values stray: where a fault is, rather than what it does in the end."""
    limit = limits(parity.dtype).layer
    for layer, ratios in enumerate(parity.layers_over_noise):
        for what, ratio in zip(("keys", "values"), ratios, strict=True):
            if not ratio <= limit:
                noise = f"{ratio:.2f} times the noise of {parity.dtype}"
                yield f"{what} of layer {layer} are off by {noise}; the limit is {limit}"
                return


def _flips(parity: Parity, table: dict[str, Tensor], near_tie_rate: float) -> Iterator[str]:
    flips, ties = int(table["flip"].sum()), int(table["near_tie"].sum())
    if flips > ties:
        row = int(((table["flip"] > 0) & (table["near_tie"] == 0)).nonzero()[0])
        gap = float(table["gap_chosen"][row])
        yield f"{flips - ties} tokens flip beyond near-ties, first at {place(parity, table, row)}, gap {gap:.2e}"
    usual = int(table["flip_noise"].sum())
    if ties > near_tie_rate * len(table["flip"]) + FLIP_LIMIT * usual:
        yield f"near-tie flips {ties} of {len(table['flip'])}; transformers in {parity.dtype} has {usual}"


def _columns(got: Summary, golden: Golden, dtype: str) -> dict[str, Tensor]:
    base, noise = golden.baseline, golden.noise
    error_TN, noise_TN = (got.values.double() - base.values).abs(), (noise.values.double() - base.values).abs()
    largest_T1 = base.values.abs().amax(-1, keepdim=True).double().clamp(min=1e-30)
    vocab_error, vocab_noise = _vocabulary(got, base), _vocabulary(noise, base)
    columns = {
        "allowed": ATOL / largest_T1[:, 0],
        "finite": (torch.isfinite(got.values).all(-1) & torch.isfinite(got.lse)).double(),
        "square_error_top": error_TN.pow(2).mean(-1), "square_noise_top": noise_TN.pow(2).mean(-1),
        "square_error_all": vocab_error, "square_noise_all": vocab_noise,
        "error_all": vocab_error.sqrt() / largest_T1[:, 0], "noise_all": vocab_noise.sqrt() / largest_T1[:, 0],
        "sigma_ratio": error_TN.std(-1, correction=0) / noise_TN.std(-1, correction=0).clamp(min=1e-300),
        "kl": _kl(base, got), "kl_noise": _kl(base, noise), "bhattacharyya": _bhattacharyya(base, got),
    }  # fmt: skip
    for k in MAP:
        size = k if k < 1000 else error_TN.shape[-1]
        for name, value in (("error", error_TN), ("noise", noise_TN)):
            columns[f"{name}_{k}"] = (value[:, :size] / largest_T1).amax(-1)
    return columns | _top(got, golden, dtype)


def _top(got: Summary, golden: Golden, dtype: str) -> dict[str, Tensor]:
    """Flipped argmaxes, and gaps of the baseline: top-1 to top-2, and top-1 to the token that the artifact chose."""
    base = golden.baseline
    first = base.values[:, 0].double()
    gap = first - base.values[:, 1].double() if base.values.shape[1] > 1 else torch.full_like(first, torch.inf)
    chosen = golden.ids == got.best[:, None]
    known = chosen.any(-1)
    value = base.values.double().gather(-1, chosen.long().argmax(-1, keepdim=True))[:, 0]
    gap_chosen = torch.where(known, first - value, torch.inf) / base.values.double().abs().amax(-1).clamp(min=1e-30)
    return {
        "flip": (got.best != base.best).double(),
        "flip_noise": (golden.noise.best != base.best).double(),
        "gap": gap,
        "gap_ulp": gap / ulp(first, dtype),
        "gap_chosen": gap_chosen,
        "chosen": got.best.double(),
        "expected": base.best.double(),
    }


def gap_of(golden: Golden, at: int, token: int) -> float:
    """By how much the baseline prefers its own choice at a position, relative to the largest logit; 0 if it is that."""
    values = golden.baseline.values[at].double()
    known = (golden.ids[at] == token).nonzero()
    if not len(known):
        return float("inf")
    return float((values[0] - values[int(known[0])]) / values.abs().max())


def noise_at(golden: Golden, at: int) -> float:
    """Noise of the largest logits at a position, relative to the largest."""
    base, noise = golden.baseline.values[at].double(), golden.noise.values[at].double()
    return float((noise - base)[:5].abs().max() / base.abs().max())


def ulp(values: Tensor, dtype: str) -> Tensor:
    """Distance of neighbouring numbers of `dtype` at these magnitudes."""
    exponent = torch.floor(torch.log2(values.abs().clamp(min=torch.finfo(torch.float32).tiny)))
    return torch.exp2(exponent) * torch.finfo(torch_dtype(dtype)).eps


def _vocabulary(one: Summary, other: Summary) -> Tensor:
    """Mean square difference over the whole vocabulary [T], by projection."""
    return (one.projected - other.projected).pow(2).sum(-1)


def _probabilities(part: Summary) -> Tensor:
    """Probabilities of the recorded ids and, last, of all others together: [T, N + 1]."""
    probs = (part.values.double() - part.lse.double()[:, None]).exp()
    rest = (1 - probs.sum(-1, keepdim=True)).clamp(min=0)
    return torch.cat((probs, rest), dim=-1)


def _kl(base: Summary, other: Summary) -> Tensor:
    """Kullback-Leibler divergence over recorded ids and the rest, in nats."""
    p, q = _probabilities(base), _probabilities(other)
    return torch.where(p > 0, p * (p.clamp(min=1e-300) / q.clamp(min=1e-300)).log(), 0.0).sum(-1).clamp(min=0)


def _bhattacharyya(base: Summary, other: Summary) -> Tensor:
    return (_probabilities(base) * _probabilities(other)).sqrt().sum(-1).clamp(max=1)


def measure(
    engine: Engine, spec: GraphSpec, sequences: Sequence[Sequence_], goldens: Sequence[Golden], parity: Parity,
    log: Callable[[str], None],
) -> None:  # fmt: skip
    """Score sequences through one graph, B at a time, and compare each with its golden."""
    for start in range(0, len(sequences), spec.batch):
        log(f"    {spec.name}: {start} of {len(sequences)} sequences")
        chosen = sequences[start : start + spec.batch]
        parts: list[list[Summary]] = [[] for _ in chosen]
        ids = [goldens[start + row].ids for row in range(len(chosen))]

        def keep(row: int, first: int, logits_TV: Tensor) -> None:
            parts[row].append(summary(logits_TV, ids[row][first : first + len(logits_TV)]))  # noqa: B023

        run_score(engine, spec, [sequence.tokens for sequence in chosen], keep)
        for row, (sequence, pieces) in enumerate(zip(chosen, parts, strict=True)):
            parity.add(sequence, spec.name, _whole(pieces), goldens[start + row])
            if state := engine.ranks.state():
                parity.add_caches(state, row, goldens[start + row])


def _whole(parts: list[Summary]) -> Summary:
    return Summary(*(torch.cat([getattr(p, name) for p in parts]) for name in ("values", "projected", "lse", "best")))


def to_json(parity: Parity, index: dict[str, int]) -> dict[str, Any]:
    """Plain data for the report: see `report.ModelParity`. `index` numbers the report's sequences."""
    table = parity.table()
    worst = {name: float(table[f"error_{name}"].max()) for name in (*map(str, MAP), "all")}
    slices = [
        {"kind": kind, "name": name, "tokens": int(rows.sum()), "error_over_noise": error_over_noise(table, rows),
         "flips": int(table["flip"][rows].sum()), "largest_error": float(table["error_1000"][rows].max())}
        for kind, name, rows in parity.groups()
    ]  # fmt: skip
    return {
        "dtype": parity.dtype,
        "tokens": len(table["flip"]),
        "worst_relative_error": worst,
        "error_over_noise": error_over_noise(table),
        "largest_token_over_noise": float(table["over_noise"].max()),
        "sigma_ratio": float(table["sigma_ratio"].median()),
        "kl_mean": float(table["kl"].mean()),
        "kl_largest": float(table["kl"].max()),
        "kl_noise_mean": float(table["kl_noise"].mean()),
        "bhattacharyya_smallest": float(table["bhattacharyya"].min()),
        "flips": int(table["flip"].sum()),
        "near_ties": int(table["near_tie"].sum()),
        "flips_of_noise": int(table["flip_noise"].sum()),
        "first_divergence": _first_divergence(parity, table),
        "layers": parity.layers_over_noise,
        "slices": slices,
        "points": _points(parity, table, index),
    }


def _points(parity: Parity, table: dict[str, Tensor], index: dict[str, int]) -> dict[str, Any]:
    """The figures of every token, in columns."""
    numbers = table["sequence"].long().tolist()
    graphs = list(dict.fromkeys(graph for _, graph in parity.sequences))
    named = {
        "error": "error_50", "noise": "noise_50", "sigma_ratio": "sigma_ratio", "kl": "kl",
        "bhattacharyya": "bhattacharyya", "gap": "gap", "gap_ulp": "gap_ulp",
    }  # fmt: skip
    return {
        "graphs": graphs,
        "sequence": [index[parity.sequences[n][0].name] for n in numbers],
        "graph": [graphs.index(parity.sequences[n][1]) for n in numbers],
        "position": [int(p) for p in table["position"]],
        "flip": [int(f + n) for f, n in zip(table["flip"], table["near_tie"], strict=True)],
        **{name: [_short(v) for v in table[column].tolist()] for name, column in named.items()},
    }


def _short(value: float) -> float:
    """Four significant digits: these columns are long."""
    return float(f"{value:.4g}")


def _first_divergence(parity: Parity, table: dict[str, Tensor]) -> dict[str, Any] | None:
    rows = table["flip"].nonzero()
    if not len(rows):
        return None
    row = int(rows[0])
    sequence, graph = parity.sequences[int(table["sequence"][row])]
    return {
        "prompt": sequence.name,
        "graph": graph,
        "position": int(table["position"][row]),
        "expected": int(table["expected"][row]),
        "chosen": int(table["chosen"][row]),
        "gap": float(table["gap"][row]),
        "gap_ulp": float(table["gap_ulp"][row]),
        "near_tie": bool(table["near_tie"][row]),
    }
