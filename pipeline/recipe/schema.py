"""The sections of a recipe as typed records, and the facts that follow from a section alone.

`read.py` reads files, `check.py` finds conflicts between sections. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PrivateAttr,
    model_validator,
)

from pipeline.addresses import misspelt
from pipeline.graphs.spec import Sampling
from pipeline.models.draft_kind import DRAFT_KINDS, DRAFT_MODEL, EAGLE3, DraftMethod
from pipeline.models.weights import NarrowWeights
from pipeline.recipe.backend_settings import BackendSettings, InductorSettings, Parallel, UnacceptedError
from pipeline.recipe.document import to_text
from pipeline.recipe.readings import READINGS, Taps
from pipeline.recipe.step_costs import StepCosts, lists
from pipeline.records import Record

Dtype = Literal["float32", "bfloat16", "float16"]

SOURCES = ("hf", "s3", "package", "pico")
"""Schemes of sources: the keys of `pipeline.sources.kinds.KINDS`; a folder has no scheme."""

BASE_DESCRIPTION = "a YAML file in the same folder with default values; keys of this file override them"
"""Description of the key `base`, which a file may have; a `Recipe` is already merged."""


LARGEST_BUCKET = 2**31 - 1
"""Largest position that fits the 32-bit integers of a graph."""


def _buckets(values: tuple[int, ...]) -> tuple[int, ...]:
    if not values:
        raise UnacceptedError("found []; accepted: at least one", "write one integer or more, for example [1]")
    usable = sorted({value for value in values if 1 <= value <= LARGEST_BUCKET}) or [1]
    fix = f"write {usable}"
    if min(values) < 1:
        raise UnacceptedError(f"found {min(values)}; accepted: integers from 1", fix)
    if max(values) > LARGEST_BUCKET:
        raise UnacceptedError(f"found {max(values)}; accepted: integers up to {LARGEST_BUCKET}", fix)
    if list(values) != usable:
        fault = "repeated" if len(set(values)) < len(values) else "not ascending"
        raise UnacceptedError(f"found {list(values)}, {fault}; accepted: {usable}", fix)
    return values


def _not_empty(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise UnacceptedError("found []; accepted: at least one", "write one item or more")
    return values


def _source(address: str) -> str:
    if mistake := misspelt(address, SOURCES):
        raise UnacceptedError(mistake.what, mistake.fix)
    scheme, separator, _ = address.partition("://")
    if separator and scheme not in SOURCES:
        accepted = ", ".join(f"{kind}://" for kind in SOURCES)
        raise UnacceptedError(f"found {address!r}; accepted: a folder, or one of {accepted}", f"use one of {accepted}")
    return address


def _flow(values: Sequence[Any]) -> str:
    """Return a list as YAML writes it."""
    return f"[{', '.join(map(str, values))}]"


def _no_repeats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        once = list(dict.fromkeys(values))
        raise UnacceptedError(f"found {list(values)}, repeated; accepted: {once}", f"write {_flow(once)}")
    return values


Buckets = Annotated[tuple[int, ...], AfterValidator(_buckets)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)]
Source = Annotated[str, Field(min_length=1), AfterValidator(_source)]


class Derive(Record):
    """A draft of the target's own files: exactly one of `layers` and `mtp`."""

    from_: Literal["target"] = Field(alias="from", description="the model whose layers are taken")
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(_not_empty)] | None = Field(
        default=None, description="layers of the target, from 0, in the order they run in the draft"
    )
    mtp: Literal[True] | None = Field(
        default=None, description="the MTP module inside the target (`mtp.*` tensors), with speculation.method mtp"
    )

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> Derive:
        if (self.layers is None) == (self.mtp is None):
            count, change = ("neither", "add") if self.layers is None else ("both", "remove")
            what = f"found {count} of layers and mtp; accepted: exactly one"
            raise UnacceptedError(what, f"{change} one of them, for example layers: [0, 1]")
        return self


class _Weighted(Record):
    """A model whose matrices can be stored narrower than its dtype."""

    weights: NarrowWeights | None = Field(
        default=None,
        description="int8: matrices and embeddings in int8, a scale for each output feature; int4: projections of "
        "layers and experts in 4 bits, a scale for 32 inputs, as GGML's Q4_0, others in int8. Only inductor on a CPU. "
        "Default: not quantised; of a draft, the target's. An embedding that the draft shares keeps its format",
    )


class Target(_Weighted):
    """The model whose output is served."""

    source: Source = Field(
        description="a folder, hf://org/name@revision, s3://bucket/prefix, package://name==version, or pico://family; "
        "folders are relative to the recipe"
    )
    dtype: Dtype = Field(default="float32", description="dtype of weights and caches")


class Draft(_Weighted):
    """The model that proposes: exactly one of `source` and `derive`."""

    source: Source | None = Field(
        default=None,
        description="like target.source; may lack an embedding (the target's is used) and have a reduced vocabulary",
    )
    derive: Derive | None = Field(default=None, description="make the draft from the target's own layers")
    dtype: Dtype | None = Field(default=None, description="default: the target's dtype")
    placement: Literal["replicated", "sharded"] = Field(
        default="replicated",
        description="replicated: whole on every rank, no collectives while drafting; sharded: split like the target",
    )
    taps: Taps | None = Field(
        default=None,
        description="states of the target that an EAGLE-3 head reads, in place of what the file says: inputs or "
        "outputs (what the ids in the file mean), layers whose inputs it reads (the number of layers: the output of "
        "the last one), or final (the target's output after its last norm, without fc)",
    )
    norm_before_residual: bool | None = Field(
        default=None, description="of an EAGLE-3 head: the residual stream starts from the normalised features"
    )
    norm_output: bool | None = Field(
        default=None, description="of an EAGLE-3 head: its own output is fed back after its last norm (EAGLE 3.1)"
    )
    rope: Literal["default", "target"] | None = Field(
        default=None, description="of an EAGLE-3 head: default, its own RoPE without scaling; target, the target's RoPE"
    )
    vocabulary: Literal["d2t", "t2d"] | None = Field(
        default=None, description="of an EAGLE-3 head: the tensor that maps its tokens to the target's; default: d2t"
    )
    mask_token_id: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="of a parallel draft: the token of masked positions; P-EAGLE files of SpecForge lack it",
    )
    sample_from_anchor: bool | None = Field(
        default=None, description="of a DFlash or DSpark draft: a position of a block predicts the token after it"
    )

    @property
    def readings(self) -> dict[str, Any]:
        """The readings of a head's file that the recipe states, as JSON."""
        return {
            key: value for key, value in self.model_dump(mode="json").items() if key in READINGS and value is not None
        }

    @model_validator(mode="after")
    def _has_one_source(self) -> Draft:
        if (self.source is None) == (self.derive is None):
            count = "neither" if self.source is None else "both"
            change = "add" if self.source is None else "remove"
            fix = f"{change} one of them: source is a model of its own, derive takes layers of the target"
            raise UnacceptedError(f"found {count} of source and derive; accepted: exactly one", fix)
        return self


LOGPROBS = 20
"""The largest `top_logprobs` of OpenAI's chat completions, and vLLM's default `--max-logprobs`."""


class Speculation(Record):
    """How tokens are proposed and chosen."""

    method: DraftMethod = Field(
        default="draft_model",
        description="what proposes: draft_model, a smaller model; eagle3, a one-layer head over the target's states; "
        "p_eagle, a head that proposes all tokens of a step in one pass; mtp, the MTP module inside the target; "
        "dflash, a model over the target's states that denoises a block of tokens in one pass; dspark, the same with a "
        "Markov head over the block's tokens",
    )
    draft_tokens: Buckets = Field(
        description="K: proposals per step, vLLM's num_speculative_tokens; a step emits 1 to K+1 tokens"
    )
    sampling: Annotated[tuple[Sampling, ...], AfterValidator(_not_empty), AfterValidator(_no_repeats)] = Field(
        default=("greedy",),
        description="graphs to build: greedy (argmax), stochastic (temperature, top-k, top-p), shaped (grammars, "
        "penalties, bias, min_p and log probabilities; with stochastic)",
    )
    candidates: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="tokens that a sampling graph keeps before sampling, for backends that cannot keep all: what is "
        "left out is never sampled, and the parity report states its mass; default: all",
    )
    logprobs: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="most probable tokens that shaped graphs report at each position, the limit of a request's "
        f"top_logprobs; default: {LOGPROBS}",
    )
    lookup: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="prompt lookup: number of last tokens to match earlier in the request; a step proposes the tokens "
        "after the match first, then tokens of the draft; recommended: 3; default: off",
    )
    step_costs: StepCosts | None = Field(
        default=None,
        description="cost of a step for each value of draft_tokens, in decode steps, as `tandem tune` measures it: a "
        "list, one for each batch bucket, or in each bucket one for caches of up to so many tokens; the runtime then "
        "chooses K, or decode steps, by acceptance rates",
    )

    @property
    def reported_logprobs(self) -> int:
        """Most probable tokens that graphs report at each position; 0 without shaped graphs."""
        given = LOGPROBS if self.logprobs is None else self.logprobs
        return given if "shaped" in self.sampling else 0

    @model_validator(mode="after")
    def _has_costs_for_each_k(self) -> Speculation:
        if self.step_costs is None:
            return self
        for costs in lists(self.step_costs):
            if len(costs) != len(self.draft_tokens):
                what = f"found {len(costs)} step_costs for {len(self.draft_tokens)} draft_tokens"
                raise UnacceptedError(
                    f"{what}; accepted: one cost for each", "measure them: tandem tune RECIPE --write"
                )
        if not DRAFT_KINDS[self.method].reads_target_states:
            accepted = ", ".join(method for method, kind in DRAFT_KINDS.items() if kind.reads_target_states)
            what = f"found step_costs with method draft_model; accepted with: {accepted}"
            raise UnacceptedError(what, "remove step_costs")
        return self


class Shapes(Record):
    """Buckets, ascending: the static shapes that graphs are compiled for."""

    batch: Buckets = Field(description="rows decoded together")
    prefill: Buckets = Field(description="prompt lengths in tokens")
    kv: Buckets = Field(description="cache lengths in tokens; the largest limits prompt + output")


class Gates(Record):
    """Limits of the validation gates."""

    tokens_per_step: Annotated[float, Field(allow_inf_nan=False, ge=1)] | None = Field(
        default=None,
        description="minimum of tokens per step, averaged over the prompts; default: "
        f"{EAGLE3.floor} for a draft that reads the target's states, {DRAFT_MODEL.floor} for a draft model",
    )
    acceptance: tuple[Annotated[float, Field(allow_inf_nan=False, ge=0, le=1)], ...] = Field(
        default=(),
        description="acceptance rates that the draft's publisher states, by place in a step, each of the drafts whose "
        "places before were accepted; the gate fails below 0.9 of them; default: none",
    )
    near_tie_rate: Annotated[float, Field(allow_inf_nan=False, ge=0, le=1)] = Field(
        default=0.02,
        description="maximum share of tokens that may differ from decode without a draft, at proven near-ties",
    )


class Validate(Record):
    """Validation gates that an artifact passes before it is published."""

    prompts: Source = Field(
        default="prompts/default.jsonl",
        description="JSON lines with class (any name; reports group by it), prompt and optionally id, relative to the "
        "recipe; the default file ships with Tandem",
    )
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(default=32, description="tokens generated for each prompt")
    gates: Gates = Field(default=Gates(), description="limits; a gate that fails stops publishing")
    price_per_hour: Annotated[float, Field(allow_inf_nan=False, gt=0)] | None = Field(
        default=None, description="price of the machine per hour; the report then states the cost per million tokens"
    )


class Publish(Record):
    """A registry that a build's artifact goes to."""

    to: Annotated[str, Field(min_length=1)] = Field(
        description="a folder, s3://bucket/prefix, hf://org/name, or oci://host/path"
    )
    aliases: Annotated[tuple[Name, ...], AfterValidator(_no_repeats)] = Field(
        default=(), description="aliases that point at the new release afterwards"
    )


Setting = bool | int | float | str | tuple[int, ...]


class Nxdi(Record):
    """What `tandem nxdi` does differently from the rest of the recipe; no other command reads this section."""

    sampling: tuple[Literal["greedy"], ...] | None = Field(
        default=None, description="in place of `speculation.sampling`: NxD Inference verifies by argmax only"
    )
    config: dict[str, Setting] = Field(
        default_factory=dict, description="keys of NxD Inference's `NeuronConfig` that no other key of a recipe decides"
    )
    environment: dict[str, str] = Field(
        default_factory=dict, description="environment variables of the compile and of the server"
    )
    max_model_len: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="vLLM's `max-model-len`; null: the cache without the tokens of one step"
    )


class Recipe(Record):
    """A target and draft pair, and every setting that determines its artifact."""

    name: Name = Field(description="name of the artifact: lower case, digits, dot, underscore, hyphen")
    target: Target = Field(description="the model whose output is served")
    draft: Draft = Field(description="the model that proposes")
    speculation: Speculation = Field(description="how tokens are proposed and chosen")
    shapes: Shapes = Field(description="buckets that graphs are compiled for")
    parallel: Parallel = Field(default=Parallel(), description="ranks")
    backend: BackendSettings = Field(default=InductorSettings(), description="what compiles and runs the graphs")
    validate_: Validate = Field(default=Validate(), alias="validate", description="validation before publishing")
    publish: tuple[Publish, ...] = Field(default=(), description="registries that the artifact goes to")
    nxdi: Nxdi | None = Field(default=None, description="settings of `tandem nxdi` alone")

    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def draft_dtype(self) -> Dtype:
        """Dtype of the draft's weights and caches."""
        return self.draft.dtype or self.target.dtype

    @property
    def draft_weights(self) -> NarrowWeights | None:
        """Storage format of the draft's matrices."""
        return self.draft.weights or self.target.weights

    @property
    def floor(self) -> float:
        """Minimum of tokens per step."""
        return self.validate_.gates.tokens_per_step or DRAFT_KINDS[self.speculation.method].floor  # it is at least 1

    def remember(self, places: Mapping[str, str], path: str) -> None:
        """Record the `file:line` of each dotted key."""
        self._places.update({**places, "": f"{path}:1"})

    def place(self, key: str) -> str:
        """Return `file:line: key` of a dotted key, for later problems; `name: key` for a recipe without a file."""
        recorded = key
        while recorded and recorded not in self._places:
            recorded = recorded[: max(recorded.rfind("."), recorded.rfind("["), 0)]
        return f"{self._places.get(recorded, self.name)}: {key}"

    def argument(self) -> str:
        """Return the argument that names this recipe in a command: its file, or its name in `recipes/`."""
        file = Path(self._places.get("", f"{self.name}:1").rpartition(":")[0])
        return file.stem if file.parent in (Path("recipes"), Path()) else shlex.quote(str(file))

    def digest(self) -> str:
        """Return the sha256 of the recipe's values, independent of layout, comments and base."""
        data = self.model_dump(mode="json", by_alias=True)
        if self.nxdi is None:
            data.pop("nxdi")
        data["validate"]["gates"]["tokens_per_step"] = self.floor
        data["draft"] = {k: v for k, v in data["draft"].items() if k not in READINGS or v is not None}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """Return the recipe as one YAML file with defaults and the merged base; `load` reads it back equal."""
        return to_text(self.model_dump(mode="json", by_alias=True, exclude_none=True))
