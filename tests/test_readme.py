"""The README: its table of support is what the code supports. Its Python example runs in `test_reference.py`."""

from __future__ import annotations

import re
import tomllib
from typing import get_args

import pytest

from pipeline.backends.base import BACKENDS
from pipeline.models.draft_kind import DRAFT_KINDS
from pipeline.models.families import FAMILIES
from pipeline.recipe.backend_settings import InductorSettings
from pipeline.recipe.chips import CHIPS
from pipeline.stores.base import STORES
from support.paths import ROOT

README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def support(row: str) -> str:
    """The cell `supported` of a row of the table of support."""
    (section,) = re.findall(r"^## Support\n(.*?)^## ", README, re.M | re.S)
    (cell,) = re.findall(rf"^\| {re.escape(row)} \| (.*?) \|", section, re.M)
    return cell


def test_support_names_every_family():
    named = re.split(r", ", support("targets").partition(";")[0])
    assert {name.lower() for name in named} == set(FAMILIES)


def test_support_names_every_backend_instruction_set_and_chip():
    rows = set(re.findall(r"^\| backend `(\w+)`", README, re.M))
    assert rows == set(BACKENDS)
    isas = {isa for isa in get_args(InductorSettings.model_fields["isa"].annotation) if isa != "native"}
    assert set(re.findall(r"`(\w+)`", support("backend `inductor`, CPU"))) == isas
    assert set(support("backend `neuron`").split(", ")) == set(CHIPS)


def test_support_names_every_kind_of_registry_and_draft():
    kinds = {"file": "folder", "s3": "S3", "hf": "Hub", "oci": "OCI"}
    assert set(support("registries").split(", ")) == {kinds[scheme] for scheme in STORES}
    words = {
        "draft_model": "smaller model", "eagle3": "EAGLE-3 head", "p_eagle": "P-EAGLE head", "dflash": "DFlash draft",
        "dspark": "DSpark draft", "mtp": "MTP module",
    }  # fmt: skip
    assert all(words[kind] in support("drafts") for kind in DRAFT_KINDS)


def test_support_has_the_server_that_the_extra_installs():
    (requirement,) = [need for need in PROJECT["optional-dependencies"]["vllm"] if need.startswith("vllm")]
    (version,) = re.findall(r">=([\d.]+)", requirement)
    assert support("server").startswith(f"vLLM {version};")


def test_support_says_where_each_row_ran():
    (section,) = re.findall(r"^## Support\n(.*?)^## ", README, re.M | re.S)
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    assert len(rows) >= 9
    assert [row for row in rows if len(row) != 3 or not row[2].strip()] == []


@pytest.mark.parametrize("profile", ["pull", "build", "build-neuron", "serve"])
def test_every_profile_is_in_the_readme_and_on_the_first_page(profile):
    assert f"pip install '.[{profile}]'" in README
    index = (ROOT / "docs/index.md").read_text()
    assert f"`pip install '.[{profile}]'` | `pip install 'tandem-spec[{profile}]'`" in index
    assert profile in PROJECT["optional-dependencies"]


def test_readme_fits_a_screen_and_a_half():
    assert len(README.splitlines()) <= 115
