"""YAML -> Recipe: the schema and every check that needs no weights and no device. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["float32", "bfloat16", "float16"]
Sampling = Literal["greedy", "stochastic"]


class Part(BaseModel):
    """Base of every section: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Derive(Part):
    """A draft made of some of the target's layers."""

    from_: Literal["target"] = Field(alias="from")
    layers: tuple[int, ...]


class Target(Part):
    source: str
    dtype: Dtype = "float32"


class Draft(Part):
    """Exactly one of `source` and `derive`."""

    source: str | None = None
    derive: Derive | None = None
    dtype: Dtype | None = None
    placement: Literal["replicated", "sharded"] = "replicated"


class Speculation(Part):
    method: Literal["draft_model"] = "draft_model"
    draft_tokens: tuple[int, ...]
    sampling: tuple[Sampling, ...] = ("greedy",)
    candidates: int | None = None


class Shapes(Part):
    batch: tuple[int, ...]
    prefill: tuple[int, ...]
    kv: tuple[int, ...]


class Parallel(Part):
    tensor: int = 1


class InductorBackend(Part):
    name: Literal["inductor"]
    device: Literal["cpu", "cuda"] = "cpu"
    isa: Literal["native", "avx2", "avx512"] = "native"


class NeuronBackend(Part):
    name: Literal["neuron"]
    target: Literal["trn1", "trn2", "inf2"]
    lnc: int = 1
    flags: dict[str, str] = {}


Backend = Annotated[InductorBackend | NeuronBackend, Field(discriminator="name")]


class Gates(Part):
    """Limits of the validation gates."""

    tokens_per_step: float = 1.0
    near_tie_rate: float = 0.02


class Validate(Part):
    prompts: str = "prompts/default.jsonl"
    max_new_tokens: int = 32
    gates: Gates = Gates()


class Publish(Part):
    to: str
    aliases: tuple[str, ...] = ()


class Recipe(Part):
    name: str
    target: Target
    draft: Draft
    speculation: Speculation
    shapes: Shapes
    parallel: Parallel = Parallel()
    backend: Backend = InductorBackend(name="inductor")
    validate_: Validate = Field(default=Validate(), alias="validate")
    publish: tuple[Publish, ...] = ()
