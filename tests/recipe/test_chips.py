"""The table of chips, and the facts of backend settings."""

from __future__ import annotations

from typing import get_args

import pytest

from pipeline.recipe.backend_settings import InductorSettings, NeuronSettings
from pipeline.recipe.chips import CHIPS, GIB, ChipName, chip_of_instance


def test_chips_have_every_name_and_are_listed_by_it() -> None:
    assert set(CHIPS) == set(get_args(ChipName))
    assert all(name == chip.name for name, chip in CHIPS.items())
    assert all(chip.default_lnc in chip.lnc for chip in CHIPS.values())


@pytest.mark.parametrize(
    ("instance", "chip"),
    [("trn2.48xlarge", "trn2"), ("trn2u.48xlarge", "trn2"), ("trn2n.48xlarge", "trn2"), ("trn1n.32xlarge", "trn1"),
     ("inf2.xlarge", "inf2"), ("trn3.48xlarge", "trn3"), ("inf1.xlarge", "inf1"), ("", "unknown")],
)  # fmt: skip
def test_chip_of_instance(instance: str, chip: str) -> None:
    """One table said trn2n is trn2, another did not."""
    assert chip_of_instance(instance) == chip


def test_lnc_shares_the_memory_and_cores_of_a_chip() -> None:
    """Two physical cores in a logical one: twice the memory, half as many."""
    one, two = (CHIPS["trn2"].cores[lnc] for lnc in (1, 2))
    assert (two.memory_bytes, 2 * two.largest_instance) == (2 * one.memory_bytes, one.largest_instance)


def test_settings_say_what_follows_from_the_backend() -> None:
    cpu, cuda = InductorSettings(), InductorSettings(device="cuda")
    neuron = NeuronSettings(name="neuron", target="trn2", lnc=2)
    assert [settings.packing for settings in (cpu, cuda, neuron)] == ["block", "plain", "in-out"]
    assert [settings.core_memory_bytes for settings in (cpu, cuda, neuron)] == [None, None, 24 * GIB]
    assert [settings.needs_candidates for settings in (cpu, cuda, neuron)] == [False, False, True]
    assert [settings.has_narrow_weights for settings in (cpu, cuda, neuron)] == [True, False, False]
    assert "packing" not in neuron.model_dump()
