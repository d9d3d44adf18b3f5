"""What `preflight` says of a host, and what a host must have to run an artifact."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.backends.neuron import support
from pipeline.backends.neuron.module import in_rank_order
from pipeline.errors import HostError
from pipeline.recipe.backend_settings import NeuronSettings

GOOD = {
    "torch": "2.9.0+cpu", "torch-xla": "2.9.0", "torch-neuronx": "2.9.0.2.13.26312+c6b58d9",
    "neuronx-distributed": "0.18.27753+abc", "libneuronxla": "2.2.16408.0", "neuronx-cc": "2.24.8799.0+6f62ff7c",
}  # fmt: skip
NEWEST = GOOD | {
    "torch-neuronx": "2.9.0.2.15.32035", "neuronx-distributed": "0.19.28492", "neuronx-cc": "2.26.6360.0",
}  # fmt: skip


@pytest.fixture(autouse=True)
def compiler_on_path(monkeypatch):
    monkeypatch.setattr(support.shutil, "which", lambda name, path=None: f"/bin/{name}")
    monkeypatch.setattr(support.sys, "version_info", (3, 12, 1))


def said(found, chip="trn2", lnc=2, values=None):
    problems = support.problems(chip, lnc, found, values or {})
    assert all(problem.fix for problem in problems)
    return [f"{problem.where}: {problem.what}" for problem in problems]


@pytest.mark.parametrize(
    "found", [GOOD, NEWEST, *(NEWEST | {"neuronx-cc": version} for version in ("2.27.5334.0", "2.28.7631.0"))]
)
@pytest.mark.parametrize("chip", ["trn1", "trn2", "inf2"])
def test_supported_releases_have_no_problem(found, chip):
    assert said(found, chip) == []


def test_no_sdk_at_all():
    (only,) = said(dict.fromkeys(support.PACKAGES, "missing") | {"torch": "2.9.0"})
    assert only == "packages: not installed: torch-xla, torch-neuronx, neuronx-distributed, libneuronxla, neuronx-cc"


def test_fix_of_a_missing_sdk_installs_from_the_vendor_s_index():
    (problem,) = support.problems("trn2", 2, GOOD | {"neuronx-cc": "missing"}, {})
    assert "--extra-index-url https://pip.repos.neuron.amazonaws.com" in problem.fix


@pytest.mark.parametrize(("name", "version"), [(n, v) for n, v in support.PLACEHOLDERS.items() if n in GOOD])
def test_placeholders_of_pypi_are_told_from_packages(name, version):
    (only,) = said(GOOD | {name: version})
    assert only == f"packages: {name} {version} is an empty placeholder from PyPI, not the SDK's package"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"torch": "2.13.0+cpu"},
            "packages.torch: found torch 2.13.0+cpu; the last torch that PyTorch/XLA on Neuron supports is 2.9",
        ),
        (
            {"neuronx-cc": "2.26.6360.0"},
            "packages.neuronx-cc: found neuronx-cc 2.26.6360.0; SDK 2.29 (of neuronx-distributed 0.18.27753+abc) has "
            "2.24.*",
        ),
        ({"torch-neuronx": "2.9.0.2.15.1"}, "packages.torch-neuronx: found torch-neuronx 2.9.0.2.15.1; "),
        (
            {"neuronx-distributed": "0.21.1"},
            "packages.neuronx-distributed: found neuronx-distributed 0.21.1; supported: ",
        ),
        ({"neuronx-cc": "2.27.5334.0"}, "packages.neuronx-cc: found neuronx-cc 2.27.5334.0; "),
    ],
)
def test_versions_that_do_not_belong_together(changes, says):
    (only,) = said(GOOD | changes)
    assert only.startswith(says)


def test_python_that_the_packages_do_not_come_for(monkeypatch):
    monkeypatch.setattr(support.sys, "version_info", (3, 14, 0))
    assert said(GOOD) == ["python: found Python 3.14; the Neuron packages support 3.11 and 3.12"]


def test_compiler_that_is_not_on_the_path(monkeypatch):
    monkeypatch.setattr(support.shutil, "which", lambda name, path=None: None)
    assert said(GOOD) == ["PATH: neuronx-cc 2.24.8799.0+6f62ff7c is installed but not on PATH"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"NEURON_CC_FLAGS": "-O3"}, "NEURON_CC_FLAGS='-O3' is set; flags outside the recipe are not used"),
        ({"NEURON_PLATFORM_TARGET_OVERRIDE": "trn1"}, "NEURON_PLATFORM_TARGET_OVERRIDE=trn1, the recipe has trn2"),
        ({"NEURON_LOGICAL_NC_CONFIG": "1"}, "NEURON_LOGICAL_NC_CONFIG=1, the recipe has 2"),
    ],
)  # fmt: skip
def test_environment_that_contradicts_the_recipe(values, says):
    assert said(GOOD, values=values) == [f"environment: {says}"]


def test_environment_keeps_what_changes_code():
    values = {"XLA_USE_BF16": "1", "NEURON_FUSE_SOFTMAX": "1", "NEURON_RT_VISIBLE_CORES": "0-3", "HOME": "/root",
              "NEURON_CC_FLAGS": "-O1"}  # fmt: skip
    assert support.environment(values) == {"NEURON_FUSE_SOFTMAX": "1", "XLA_USE_BF16": "1"}


TRN1_2XLARGE = """
[
    {
        "neuron_device": 0,
        "bdf": "0000:00:1e.0",
        "cpu_affinity": "0-7",
        "numa_node": "-1",
        "connected_to": null,
        "nc_count": 2,
        "memory_size": 34359738368,
        "neuroncore_ids": [
            0,
            1
        ],
        "neuron_processes": []
    }
]
"""
"""What `neuron-ls --json-output` printed on a trn1.2xlarge."""
TRN2_3XLARGE = """instance-type: trn2.3xlarge
instance-id: i-0abcdef1234567890
logical-neuroncore-config: 2
+--------+--------+----------+--------+--------------+----------+------+
| NEURON | NEURON |  NEURON  | NEURON |     PCI      |   CPU    | NUMA |
| DEVICE | CORES  | CORE IDS | MEMORY |     BDF      | AFFINITY | NODE |
+--------+--------+----------+--------+--------------+----------+------+
| 0      | 4      | 0-3      | 96 GB  | 0000:33:00.0 | 0-11     | 0    |
+--------+--------+----------+--------+--------------+----------+------+
"""
"""What `neuron-ls` printed on a trn2.3xlarge."""
NOWHERE = Path("/nonexistent")


def listed(instance, lnc, cores, devices=2):
    entry = json.loads(TRN1_2XLARGE)[0] | {"nc_count": cores, "memory_size": 96 << 30}
    header = f"instance-type: {instance}\ninstance-id: i-0\nlogical-neuroncore-config: {lnc}\n+---+\n"
    return support.parse_devices(json.dumps([entry] * devices), header, NOWHERE)


def test_devices_of_neuron_ls():
    """The JSON has neither instance type nor LNC: they were read from keys that it never had."""
    found = listed("trn2n.48xlarge", 2, 4, devices=16)
    assert (found.chip, found.cores, found.lnc, found.core_bytes) == ("trn2", 64, 2, 24 << 30)
    assert support.parse_devices("[]", TRN2_3XLARGE) is None


def test_devices_as_two_instances_print_them(tmp_path, monkeypatch):
    monkeypatch.delenv("NEURON_LOGICAL_NC_CONFIG", raising=False)
    found = support.parse_devices(TRN1_2XLARGE, TRN2_3XLARGE, NOWHERE)
    assert (found.instance, found.lnc) == ("trn2.3xlarge", 2)
    (tmp_path / "product_name").write_text("trn1.2xlarge\n")  # of a neuron-ls without lines above its table
    found = support.parse_devices(TRN1_2XLARGE, "+--------+\n", tmp_path / "product_name")
    assert found == support.Device("trn1.2xlarge", 2, 1, 16 << 30)
    (tmp_path / "product_name").write_text("trn2.48xlarge\n")
    assert support.parse_devices(TRN1_2XLARGE, "", tmp_path / "product_name").lnc == 2  # the chip's default
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "1")
    assert support.parse_devices(TRN1_2XLARGE, "", tmp_path / "product_name").lnc == 1
    assert support.parse_devices(TRN1_2XLARGE, "", NOWHERE).chip == "unknown"


@pytest.mark.parametrize(
    "text", ["", '{"neuron_device": 0}', "[1]", '[{"neuron_device": 0}]', '{"neuron_devices": []}', "no devices"]
)
def test_neuron_ls_that_prints_another_format_is_named(text):
    with pytest.raises(HostError, match="neuron-ls: its output is no list of devices"):
        support.parse_devices(text, "")


@pytest.mark.parametrize(
    ("here", "says"),
    [
        (None, "device: no Neuron device on this host"),
        (("trn1.32xlarge", 1, 2), "device.chip: the artifact is for trn2, this host is trn1.32xlarge (trn1)"),
        (("trn2.48xlarge", 1, 8), "device.lnc: the artifact needs lnc=2, this host runs with 1"),
        (("trn2.48xlarge", 2, 2), "device.cores: the artifact needs 8 cores, this host has 4"),
    ],
)
def test_run_problems_name_both_values(here, says):
    found = support.run_problems("trn2", 2, 8, None if here is None else listed(*here))
    assert f"{found[0].where}: {found[0].what}" == says


def test_run_problems_of_a_host_that_fits():
    assert support.run_problems("trn2", 2, 8, listed("trn2.48xlarge", 2, 4)) == []


def test_gathered_logits_are_in_the_order_of_ranks():
    """NxD's group of 64 on trn2 with lnc=1 is not in that order: samples were other tokens, without an error."""
    group = [*range(16), *range(48, 64), *range(16, 48)]  # parallel_state.py, ascending_descending_ring_PG_group
    gathered = torch.cat([torch.arange(3) + 3 * rank for rank in group])[None, None]
    assert in_rank_order(gathered, group).flatten().tolist() == list(range(192))
    same = torch.arange(6)[None]
    assert in_rank_order(same, [0, 1, 2]) is same


def test_the_default_lnc_is_that_of_the_chips_runtime():
    assert [NeuronSettings(name="neuron", target=chip).lnc for chip in ("trn1", "trn2", "inf2")] == [1, 2, 1]
