"""The Neuron chips that recipes can name, with every fact that depends on the chip alone. Imports nothing of Tandem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ChipName = Literal["trn1", "trn2", "trn3", "inf2"]

GIB = 1 << 30


@dataclass(frozen=True)
class Core:
    """A logical core at one LNC: its device memory, the number on the largest instance, and its limits of speed."""

    memory_bytes: int
    largest_instance: int
    flops: float
    """Products in bfloat16, multiplications and additions per second."""
    bytes_per_s: float
    """Bandwidth of device memory."""


@dataclass(frozen=True)
class Chip:
    """One chip: its logical cores by LNC (physical cores in a logical one), and the instance families that carry it."""

    name: ChipName
    cores: Mapping[int, Core]
    families: tuple[str, ...]
    default_lnc: int = 1
    """LNC of the Neuron runtime if no environment variable sets it."""

    @property
    def lnc(self) -> tuple[int, ...]:
        """Accepted LNC values."""
        return tuple(self.cores)


CHIPS: Mapping[ChipName, Chip] = {
    "trn1": Chip("trn1", {1: Core(16 * GIB, 32, 95e12, 410e9)}, ("trn1", "trn1n")),
    "trn2": Chip(
        "trn2",
        {1: Core(12 * GIB, 128, 83e12, 362e9), 2: Core(24 * GIB, 64, 167e12, 725e9)},
        ("trn2", "trn2n", "trn2u"),
        default_lnc=2,
    ),
    "trn3": Chip(
        "trn3",
        {1: Core(18 * GIB, 32, 84e12, 612e9), 2: Core(36 * GIB, 16, 168e12, 1225e9)},
        ("trn3", "trn3e", "trn3p", "trn3pds", "trn3s"),
        default_lnc=2,
    ),
    "inf2": Chip("inf2", {1: Core(16 * GIB, 24, 95e12, 410e9)}, ("inf2",)),
}
"""By name (Neuron SDK, feature guide on logical cores; EC2 instance types). Of trn3: eight cores and 144 GiB in a chip
(SDK 2.29, Trainium3 architecture), four chips in a trn3.48xlarge, families as the Neuron driver names them. Speeds are
a chip's (architecture guides: Trn1 and Inf2 190 TFLOPS and 0.82 TB/s, Trn2 667 and 2.9, Trn3 671 and 4.9), by core."""


def chip_of_instance(instance_type: str) -> str:
    """Return the chip of an EC2 instance type; the instance family where no known chip has it, `unknown` if empty."""
    family = instance_type.partition(".")[0]
    return next((chip.name for chip in CHIPS.values() if family in chip.families), family or "unknown")
