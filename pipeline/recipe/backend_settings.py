"""Settings of the backends and of their ranks in a recipe, and the facts that follow from them. Imports no torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline.recipe.chips import CHIPS, ChipName
from pipeline.records import Record

Packing = Literal["block", "plain", "in-out"]
"""Layout of weights in the shards: `graphs.packing.PACKINGS`."""


class UnacceptedError(ValueError):
    """A value that a key does not accept, and what to write instead."""

    def __init__(self, what: str, fix: str) -> None:
        self.what, self.fix = what, fix
        super().__init__(f"{what}; {fix}")


def _version(value: str | None) -> str | None:
    if value is not None and not all(part.isdecimal() for part in value.split(".")):
        raise UnacceptedError(f"found {value!r}, expected numbers with dots", "write for example '13' or '13.3.0'")
    return value


class InductorSettings(Record):
    """AOTInductor: shared libraries for CPUs and NVIDIA GPUs."""

    name: Literal["inductor"] = "inductor"
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="device that the artifact runs on")
    isa: Literal["native", "avx2", "avx512"] = Field(
        default="native", description="instruction set that a CPU artifact needs; native: the build host's"
    )
    cxx: Annotated[str | None, AfterValidator(_version)] = Field(
        default=None,
        description="version of the C++ compiler that a build must have, for example `'13'` or `'13.3.0'`; null: any",
    )

    core_memory_bytes: ClassVar[None] = None
    core_name: ClassVar[str] = "the host"
    needs_candidates: ClassVar[bool] = False

    @property
    def packing(self) -> Packing:
        """Layout of weights in the shards."""
        return "block" if self.device == "cpu" else "plain"

    @property
    def skips_unseen_keys(self) -> bool:
        """True where attention over a cache takes time for the keys alone that a query sees."""
        return self.device == "cpu"

    @property
    def has_narrow_weights(self) -> bool:
        """True where the backend has kernels for int8 and 4-bit weights."""
        return self.device == "cpu"


class NeuronSettings(Record):
    """AWS Neuron: NEFFs for Trainium and Inferentia."""

    name: Literal["neuron"]
    target: ChipName = Field(description="chip")
    lnc: int = Field(
        default_factory=lambda data: CHIPS[data["target"]].default_lnc if "target" in data else 1,
        description="physical cores in a logical one: 1 or 2 on trn2 (default 2, as the runtime's), 1 elsewhere",
    )
    frontend: Literal["xla", "stablehlo"] = Field(
        default="xla", description="what traces graphs: PyTorch/XLA and NxD, or torch-mlir, which needs neither"
    )
    flags: dict[str, str] = Field(default_factory=dict, description="extra neuronx-cc flags")

    packing: ClassVar[Packing] = "in-out"
    skips_unseen_keys: ClassVar[bool] = False
    has_narrow_weights: ClassVar[bool] = False
    needs_candidates: ClassVar[bool] = True

    @property
    def core_memory_bytes(self) -> int:
        """Device memory of a logical core."""
        return CHIPS[self.target].cores[self.lnc].memory_bytes

    @property
    def core_name(self) -> str:
        """Name of a core in messages."""
        return f"a core with lnc={self.lnc}"

    @model_validator(mode="after")
    def _lnc_fits(self) -> NeuronSettings:
        allowed = CHIPS[self.target].lnc
        if self.lnc not in allowed:
            accepted = " or ".join(map(str, allowed))
            raise UnacceptedError(
                f"found lnc={self.lnc}; accepted on {self.target}: {accepted}", f"write lnc: {allowed[-1]}"
            )
        return self


BackendSettings = Annotated[InductorSettings | NeuronSettings, Field(discriminator="name")]


class Parallel(Record):
    """Ranks."""

    tensor: Annotated[int, Field(ge=1)] = Field(default=1, description="tensor-parallel ranks")
    enable_expert_parallel: bool = Field(
        default=False,
        description="whole experts on different ranks (expert parallelism), instead of a slice of each on every rank",
    )
