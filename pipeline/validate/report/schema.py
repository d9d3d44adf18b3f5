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
from pipeline.files.limits import first_error
from pipeline.records import Record


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
"""A number; null where it is infinite or not a number: JSON has neither."""


class Gate(Record):
    """Result of one gate."""

    name: str = Field(description="name of the gate")
    passed: bool = Field(description="result")
    findings: tuple[str, ...] = Field(description="reasons of a failure")


class TokenSequence(Record):
    """Tokens that were scored: a prompt with its answer, or a probe that fills the cache."""

    name: str = Field(description="name of the prompt or probe")
    kind: str = Field(validation_alias="class", serialization_alias="class", description="class of the prompt")
    prompt_tokens: int = Field(description="number of prompt tokens; the rest are the answer")
    tokens: tuple[int, ...] = Field(description="token ids")
    texts: tuple[str, ...] = Field(description="text of each token")


SliceKind = Literal["graph", "class", "prompt", "positions"]


class Slice(Record):
    """Measurements of a group of tokens."""

    kind: SliceKind = Field(description="what the tokens have in common")
    name: str = Field(description="graph, class, prompt or range of positions")
    tokens: int = Field(description="number of tokens")
    error_over_noise: Number = Field(description="error of the artifact over noise of the dtype")
    flips: int = Field(description="tokens for which the artifact's choice differs from the baseline's")
    largest_error: Number = Field(description="largest error of a token over its top 1000 logits")


class Divergence(Record):
    """The first token for which the artifact's choice differs from the baseline's."""

    prompt: str = Field(description="name of the prompt")
    graph: str = Field(description="graph that chose the token")
    position: int = Field(description="position in the sequence")
    expected: int = Field(description="token id of the baseline")
    chosen: int = Field(description="token id of the artifact")
    gap: Number = Field(description="baseline's top-1 minus top-2 logit")
    gap_ulp: Number = Field(description="the same in units in the last place of the dtype")
    near_tie: bool = Field(description="whether the gap is within the noise")


class Points(Record):
    """Measurements of every token, in columns: the lists have one value per token."""

    graphs: tuple[str, ...] = Field(description="names of graphs; `graph` is an index into this list")
    sequence: tuple[int, ...] = Field(description="index into the report's `sequences`")
    graph: tuple[int, ...] = Field(description="index into `graphs`")
    position: tuple[int, ...] = Field(description="position in the sequence")
    flip: tuple[int, ...] = Field(description="0: same choice as the baseline; 1: flipped; 2: flipped at a near-tie")
    error: tuple[Number, ...] = Field(description="largest error of the top 50 logits over the largest logit")
    noise: tuple[Number, ...] = Field(description="the same of transformers in the recipe's dtype")
    sigma_ratio: tuple[Number, ...] = Field(description="spread of the error over spread of the noise")
    kl: tuple[Number, ...] = Field(description="Kullback-Leibler divergence from the baseline, nats")
    bhattacharyya: tuple[Number, ...] = Field(description="Bhattacharyya coefficient with the baseline")
    gap: tuple[Number, ...] = Field(description="baseline's top-1 minus top-2 logit")
    gap_ulp: tuple[Number, ...] = Field(description="the same in units in the last place of the dtype")


class Rounding(Record):
    """Effect of int8 or 4-bit weights, measured in the reference: the rounded weights against those of the dtype."""

    tokens: int = Field(description="number of tokens")
    same_choice: Number = Field(description="share of tokens after which the likeliest next one is the same")
    same_choice_of_noise: Number = Field(description="that share for the dtype against one precision up")
    logit_error: Number = Field(description="root of the mean square difference of logits")
    logit_noise: Number = Field(description="that of the dtype against one precision up")


class OfExpert(Record):
    """Error of the tokens that one expert computed."""

    layer: int = Field(description="layer of the expert")
    expert: int = Field(description="number of the expert")
    tokens: int = Field(description="number of tokens that used it")
    error_over_noise: Number = Field(description="error over noise of these tokens after the layer")


class ExpertChoices(Record):
    """Choices of experts. Where the artifact's is not the baseline's, but a near-tie, the reference follows it."""

    choices: int = Field(description="number of choices: tokens times layers with experts")
    near_ties: int = Field(description="choices that differ from the baseline's")
    near_ties_of_noise: int = Field(description="choices that transformers changes in the recipe's dtype")
    tokens: int = Field(description="tokens with such a choice in some layer")
    largest_gap_over_noise: Number = Field(
        description="largest gap of the router's scores at such a choice over the noise of its scores"
    )
    layers: tuple[int, ...] = Field(description="choices that differ, by layer with experts")
    compared: int = Field(description="experts, of all layers, that enough tokens used; none where ranks share caches")
    worst: OfExpert | None = Field(description="that with the largest error, of those compared")


class ModelParity(Record):
    """Gate 1, numerical parity, of one model."""

    dtype: str = Field(description="dtype of the model")
    tokens: int = Field(description="number of tokens that were compared")
    worst_relative_error: dict[str, Number] = Field(
        description="largest relative error of a token, by the number of top logits that are compared"
    )
    error_over_noise: Number = Field(
        description="error of the artifact over noise of the dtype; 1 is as accurate as transformers in the dtype"
    )
    largest_token_over_noise: Number = Field(description="largest error of a token over the largest noise")
    sigma_ratio: Number = Field(description="median over tokens")
    kl_mean: Number = Field(description="mean Kullback-Leibler divergence from the baseline, nats")
    kl_largest: Number = Field(description="largest of these divergences")
    kl_noise_mean: Number = Field(description="the same mean of transformers in the recipe's dtype")
    bhattacharyya_smallest: Number = Field(description="smallest Bhattacharyya coefficient with the baseline")
    flips: int = Field(description="tokens for which the artifact's choice differs from the baseline's")
    near_ties: int = Field(description="flips at a near-tie")
    flips_of_noise: int = Field(description="tokens that transformers itself flips in the recipe's dtype")
    first_divergence: Divergence | None = Field(description="first flip; null without one")
    layers: tuple[tuple[Number, Number], ...] = Field(
        description="error over noise of each layer's keys and values; empty where ranks share them"
    )
    experts: ExpertChoices | None = Field(default=None, description="choices of experts; null without experts")
    rounding: Rounding | None = Field(default=None, description="effect of int8 or 4-bit weights; null without them")
    slices: tuple[Slice, ...] = Field(description="measurements by graph, class, prompt and position")
    points: Points = Field(description="measurements of every token")


class Difference(Record):
    """A position where speculation and plain decode differ."""

    graph: str = Field(description="speculative graph")
    prompt: str = Field(description="name of the prompt")
    position: int = Field(description="position in the sequence")
    plain: int = Field(description="token id of plain decode; for a K after the first, of the first K")
    speculative: int = Field(description="token id of speculation")
    gap: Number = Field(description="distance of the two tokens' logits")
    near_tie: bool = Field(description="whether the gap is within the tolerance of ties")


class Edge(Record):
    """Tokens of a graph that were compared at the end of its bucket."""

    graph: str = Field(description="name of the graph")
    tokens: int = Field(description="number of tokens")


class Losslessness(Record):
    """Gate 2, greedy: speculation emits the tokens of plain decode."""

    tokens: int = Field(description="number of tokens that were compared")
    near_ties: int = Field(description="differences at a near-tie")
    tie_tolerance: Number = Field(description="largest gap of logits that counts as a tie")
    differences: tuple[Difference, ...] = Field(description="positions where the tokens differ")
    edges: tuple[Edge, ...] = Field(description="comparisons at the ends of buckets")


class ExactTest(Record):
    """One test of a stochastic graph."""

    graph: str = Field(description="name of the graph, or of several together")
    test: str = Field(description="name of the test")
    tokens: int = Field(description="number of sampled tokens")
    p_value: Number = Field(description="p-value of the test")


class Distribution(Record):
    """Gate 2, stochastic: speculation samples from the distribution of plain decode."""

    false_alarm_rate: float = Field(description="probability that a correct artifact fails the gate")
    settings: tuple[str, ...] = Field(description="sampling settings of the tests; rows of a batch have different ones")
    tokens: int = Field(description="sampled tokens that were compared with those that their seeds select")
    candidates: int | None = Field(description="the recipe's speculation.candidates; null: all tokens can be sampled")
    mass_left_out: tuple[float, float] | None = Field(
        description="probability at temperature 1 of the tokens that candidates leave out: mean and largest; null: none"
    )
    tests: tuple[ExactTest, ...] = Field(description="tests by graph, by kind of graph, and by settings")


class OfClass(Record):
    """Acceptance of one class of prompts."""

    tokens_per_step: float = Field(description="mean number of tokens that a step emits")
    accepted_by_position: tuple[float, ...] = Field(
        description="share of steps that accept the draft token at each position"
    )


class Acceptance(Record):
    """Gate 3: acceptance of draft tokens, for one K."""

    draft_tokens: int = Field(description="K")
    tokens_per_step: float = Field(description="mean number of tokens that a step emits")
    accepted_by_position: tuple[float, ...] = Field(
        description="share of steps that accept the draft token at each position"
    )
    accepted_given_previous: tuple[float, ...] = Field(
        description="the same share, of steps that accepted the position before"
    )
    teacher_forced: tuple[float, ...] = Field(
        default=(),
        description="the same rates for the draft's choices under teacher forcing, of steps without copied tokens; "
        "of the first K only",
    )
    lookup_alone: float | None = Field(
        default=None, description="tokens per step of prompt lookup alone, for these answers; of the first K only"
    )
    lengths: tuple[int, ...] = Field(description="number of steps that emitted 1, 2, ... K+1 tokens")
    by_class: dict[str, OfClass] = Field(description="acceptance by class of prompts")
    by_prompt: dict[str, float] = Field(description="tokens per step by prompt")


class Latencies(Record):
    """Latencies of one way of decoding, one request at a time."""

    first_token_ms: float = Field(description="time to the first token, in milliseconds")
    step_ms: tuple[float, ...] = Field(description="time of each step, in milliseconds")
    step_p50_ms: Number = Field(description="median of the steps")
    step_p99_ms: Number = Field(description="99th percentile of the steps")
    inter_token_ms: Number = Field(description="mean time per token after the first")
    tokens_per_s: float = Field(description="tokens per second")


class Cost(Record):
    """Cost of a million tokens, in the currency of the recipe's price; null without a price."""

    plain: Number = Field(description="plain decode")
    speculative: Number = Field(description="speculation")


class Speed(Record):
    """Gate 4: speed with and without speculation."""

    draft_tokens: int = Field(description="K")
    prompts: tuple[str, ...] = Field(description="names of the measured prompts")
    plain: Latencies = Field(description="plain decode")
    speculative: Latencies = Field(description="speculation")
    measured_speedup: Number = Field(description="time of plain decode over time of speculation")
    expected_speedup: Number = Field(description="speed-up computed from the acceptance rates and the draft's cost")
    draft_cost: Number = Field(description="weights of a draft pass over those of a target pass")
    cost_per_million_tokens: Cost = Field(description="cost of a million tokens")


class Choices(Record):
    """Tokens of the answers and of the prefill graphs against the baseline's own choice."""

    tokens: int = Field(description="number of tokens that were compared")
    near_ties: int = Field(description="tokens that differ from the baseline's choice")
    flips_of_noise: int = Field(description="tokens that transformers itself flips in the recipe's dtype")
    after_router_ties: int = Field(
        default=0, description="tokens after a near-tie of a router that differ from the choice along every reference"
    )


class Tested(Record):
    """What was tested."""

    prompts: int = Field(description="number of prompts")
    classes: tuple[str, ...] = Field(description="classes of prompts")
    graphs: tuple[str, ...] = Field(description="graphs that ran")
    batch: tuple[int, ...] = Field(description="batch buckets")
    prefill: tuple[int, ...] = Field(description="prefill buckets, in tokens")
    kv: tuple[int, ...] = Field(description="cache buckets, in tokens")
    draft_tokens: tuple[int, ...] = Field(description="values of K")
    sampling: tuple[str, ...] = Field(description="kinds of sampling")
    ranks: int = Field(description="tensor-parallel ranks")
    dtype: str = Field(description="dtype of the target")
    settings: tuple[str, ...] = Field(default=(), description="settings of generation that the gates used")
    eos_ids: tuple[int, ...] = Field(default=(), description="tokens that end an answer")
    not_applied: tuple[str, ...] = Field(
        default=(), description="settings of the model's generation_config.json that the artifact does not apply"
    )
    cut_prompts: tuple[str, ...] = Field(
        description="prompts that do not fit the caches with an answer: only their ends ran"
    )


class Cached(Record):
    """Sequences whose reference was computed, and those that were cached."""

    computed: int = Field(description="sequences computed in this run")
    cached: int = Field(description="sequences from the local cache")


class Provenance(Record):
    """Where the measurements come from."""

    recipe_digest: str = Field(description="SHA-256 of the recipe")
    lock_digest: str = Field(description="SHA-256 of the lock")
    toolchain: dict[str, str] = Field(description="versions that compiled the graphs")
    requires: dict[str, str] = Field(description="host that the artifact needs")
    ran_on: dict[str, str] = Field(description="host that ran the gates")
    transformers: str = Field(description="version of transformers, which computed the baseline")
    created: str = Field(description="time of the build, UTC")
    goldens: dict[str, Cached] = Field(description="reference sequences by model")
    seconds: dict[str, float] = Field(description="duration of each stage of the validation, in seconds")


class Report(Record):
    """The numerical parity report of one artifact: `reports/parity.json`."""

    format: Literal["tandem-parity-2"] = Field(default="tandem-parity-2", description="name and version of this format")
    name: str = Field(description="name of the artifact")
    version: str = Field(description="version of the artifact")
    passed: bool = Field(description="whether every gate passed")
    gates: tuple[Gate, ...] = Field(description="result of each gate")
    tested: Tested = Field(description="what was tested")
    parity: dict[str, ModelParity] = Field(description="gate 1, by model: `target` and `draft`")
    choices: Choices = Field(description="tokens of answers and prefill graphs against the baseline's choice")
    losslessness: Losslessness = Field(description="gate 2, greedy")
    distribution: Distribution | None = Field(description="gate 2, stochastic; null without stochastic graphs")
    acceptance: tuple[Acceptance, ...] = Field(description="gate 3, for each K")
    speed: Speed = Field(description="gate 4")
    sequences: tuple[TokenSequence, ...] = Field(description="tokens of the prompts, answers and probes")
    provenance: Provenance = Field(description="origin of the measurements")


def to_bytes(report: Report) -> bytes:
    """Return the text of `parity.json`."""
    return json.dumps(report.model_dump(mode="json", by_alias=True), allow_nan=False, separators=(",", ":")).encode()


def read(data: bytes, where: str) -> Report:
    """Return a report from its bytes.

    Raises:
        InputError: the bytes are not a report of this format.

    """
    try:
        return Report.model_validate_json(data)
    except ValidationError as error:
        first = first_error(error)
        what = f"not a parity report of this version: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise InputError(what, where=where, fix="tandem validate ARTIFACT") from error


def load(root: Path) -> Report:
    """Return the report of an artifact.

    Raises:
        InputError: the artifact has no report, or a report of another version of Tandem.

    """
    path = root / "reports" / "parity.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError("no parity report", where=str(path), fix=f"tandem validate {root}") from error
    return read(data, str(path))


def schema() -> dict[str, Any]:
    """Return the JSON Schema of `parity.json`."""
    fields = Report.model_json_schema(by_alias=True, mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **fields}
