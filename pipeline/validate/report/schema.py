"""The results of the gates as data: `parity.json` and its schema. No torch.

Every other form (page, terminal, Markdown, JUnit, comparison) is made from this one object, so their numbers agree.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from pipeline.errors import InputError
from pipeline.records import Record


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
"""A number; null where it is infinite or not a number, which JSON cannot say."""


class Gate(Record):
    """One gate: its findings, none when it passed."""

    name: str
    passed: bool
    findings: tuple[str, ...]


class TokenSequence(Record):
    """Tokens that were scored: a prompt with its answer, or a probe that fills the cache."""

    name: str
    kind: str = Field(validation_alias="class", serialization_alias="class")
    prompt_tokens: int = Field(description="how many of the tokens were given; the rest are the answer")
    tokens: tuple[int, ...]
    texts: tuple[str, ...]


SliceKind = Literal["graph", "class", "prompt", "positions"]


class Slice(Record):
    """Measurements of some tokens: those of a graph, a class, a prompt, a stretch of positions."""

    kind: SliceKind
    name: str
    tokens: int
    error_over_noise: Number
    flips: int
    largest_error: Number


class Divergence(Record):
    """The first token that the artifact would choose otherwise than the baseline."""

    prompt: str
    graph: str
    position: int
    expected: int
    chosen: int
    gap: Number = Field(description="baseline's top-1 minus top-2 logit")
    gap_ulp: Number = Field(description="the same in units in the last place of the dtype")
    near_tie: bool


class Points(Record):
    """Measurements of every token, in columns. `flip`: 0 as the baseline, 1 flipped, 2 flipped at a near-tie."""

    graphs: tuple[str, ...]
    sequence: tuple[int, ...]
    graph: tuple[int, ...]
    position: tuple[int, ...]
    flip: tuple[int, ...]
    error: tuple[Number, ...] = Field(description="largest error of the top 50 logits over the largest logit")
    noise: tuple[Number, ...] = Field(description="the same of transformers in the recipe's dtype")
    sigma_ratio: tuple[Number, ...] = Field(description="spread of the error over spread of the noise")
    kl: tuple[Number, ...] = Field(description="Kullback-Leibler divergence from the baseline, nats")
    bhattacharyya: tuple[Number, ...] = Field(description="Bhattacharyya coefficient with the baseline")
    gap: tuple[Number, ...]
    gap_ulp: tuple[Number, ...]


class Rounding(Record):
    """What int8 weights changed against the dtype's own, in the reference."""

    tokens: int
    same_choice: Number = Field(description="share of tokens after which the likeliest next one is the same")
    same_choice_of_noise: Number = Field(description="that share for the dtype against one precision up")
    logit_error: Number = Field(description="root of the mean square difference of logits")
    logit_noise: Number = Field(description="that of the dtype against one precision up")


class ModelParity(Record):
    """Gate 1 of one model."""

    dtype: str
    tokens: int
    worst_relative_error: dict[str, Number]
    error_over_noise: Number
    largest_token_over_noise: Number
    sigma_ratio: Number = Field(description="median over tokens")
    kl_mean: Number
    kl_largest: Number
    kl_noise_mean: Number
    bhattacharyya_smallest: Number
    flips: int
    near_ties: int
    flips_of_noise: int = Field(description="tokens that transformers itself flips in the recipe's dtype")
    first_divergence: Divergence | None
    layers: tuple[tuple[Number, Number], ...] = Field(
        description="error over noise of each layer's keys and values; empty where ranks share them"
    )
    rounding: Rounding | None = None
    slices: tuple[Slice, ...]
    points: Points


class Difference(Record):
    """A position where speculation and plain decode differ."""

    graph: str
    prompt: str
    position: int
    plain: int
    speculative: int
    gap: Number
    near_tie: bool


class Edge(Record):
    """Tokens of a graph that were compared at the end of its bucket."""

    graph: str
    tokens: int


class Losslessness(Record):
    """Gate 2, greedy."""

    tokens: int
    near_ties: int
    tie_tolerance: Number
    differences: tuple[Difference, ...]
    edges: tuple[Edge, ...]


class ExactTest(Record):
    """One test of a stochastic graph."""

    graph: str
    test: str
    tokens: int
    p_value: Number
    shift: Number = Field(description="probability moved to the draft's tokens that it finds with 90% power")


class Distribution(Record):
    """Gate 2, stochastic."""

    false_alarm_rate: float
    temperature: float
    top_k: int
    top_p: float
    tests: tuple[ExactTest, ...]


class OfClass(Record):
    """Acceptance of one class of prompts."""

    tokens_per_step: float
    accepted_by_position: tuple[float, ...]


class Acceptance(Record):
    """Gate 3, one K. `lengths[i]` counts steps that emitted i + 1 tokens."""

    draft_tokens: int
    tokens_per_step: float
    accepted_by_position: tuple[float, ...]
    accepted_given_previous: tuple[float, ...]
    lengths: tuple[int, ...]
    by_class: dict[str, OfClass]
    by_prompt: dict[str, float]


class Latencies(Record):
    """One way of decoding, one request at a time."""

    first_token_ms: float
    step_ms: tuple[float, ...]
    step_p50_ms: Number
    step_p99_ms: Number
    inter_token_ms: Number
    tokens_per_s: float


class Cost(Record):
    """Cost of a million tokens, in the currency of the recipe's price; null without one."""

    plain: Number
    speculative: Number


class Speed(Record):
    """Gate 4."""

    draft_tokens: int
    prompts: tuple[str, ...]
    plain: Latencies
    speculative: Latencies
    measured_speedup: Number
    expected_speedup: Number
    draft_cost: Number = Field(description="weights of a draft pass over those of a target pass")
    cost_per_million_tokens: Cost


class Choices(Record):
    """Tokens of the answers and of the prefill graphs against the baseline's own choice."""

    tokens: int
    near_ties: int
    flips_of_noise: int


class Tested(Record):
    """What was tested."""

    prompts: int
    classes: tuple[str, ...]
    graphs: tuple[str, ...]
    batch: tuple[int, ...]
    prefill: tuple[int, ...]
    kv: tuple[int, ...]
    draft_tokens: tuple[int, ...]
    sampling: tuple[str, ...]
    ranks: int
    dtype: str
    cut_prompts: tuple[str, ...] = Field(description="prompts longer than the largest prefill bucket: their ends ran")


class Cached(Record):
    """Sequences whose reference was computed, and those that were cached."""

    computed: int
    cached: int


class Provenance(Record):
    """Where the measurements come from."""

    recipe_digest: str
    lock_digest: str
    toolchain: dict[str, str]
    requires: dict[str, str]
    ran_on: dict[str, str]
    transformers: str
    created: str
    goldens: dict[str, Cached]
    seconds: dict[str, float]


class Report(Record):
    """The numerical parity report of one artifact: `reports/parity.json`."""

    format: Literal["tandem-parity-1"] = "tandem-parity-1"
    name: str
    version: str
    passed: bool
    gates: tuple[Gate, ...]
    tested: Tested
    parity: dict[str, ModelParity]
    choices: Choices
    losslessness: Losslessness
    distribution: Distribution | None
    acceptance: tuple[Acceptance, ...]
    speed: Speed
    sequences: tuple[TokenSequence, ...]
    provenance: Provenance


def to_bytes(report: Report) -> bytes:
    """`parity.json`."""
    return json.dumps(report.model_dump(mode="json", by_alias=True), allow_nan=False, separators=(",", ":")).encode()


def read(data: bytes, where: str) -> Report:
    """A report from its bytes.

    Raises:
        InputError: it is not one of this format.

    """
    try:
        return Report.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"not a parity report of this version: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise InputError(what, where=where, fix="run `tandem validate` on the artifact") from error


def load(root: Path) -> Report:
    """The report of an artifact.

    Raises:
        InputError: it has not been validated, or by another version.

    """
    path = root / "reports" / "parity.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError("no parity report", where=str(path), fix="run `tandem validate` on the artifact") from error
    return read(data, str(path))


def schema() -> dict[str, Any]:
    """JSON Schema of `parity.json`."""
    fields = Report.model_json_schema(by_alias=True, mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **fields}
