"""`tandem doctor`: facts about this machine, and what keeps it from a recipe, before an hour is lost."""

import json
import re
import shutil

import pytest

from pipeline import doctor
from pipeline.backends import base
from pipeline.recipe import load
from support.commands import invoke
from support.neuron_lane import DEVICE, environment, tandem
from support.paths import ROOT

RECIPES = ROOT / "recipes"
GIB = doctor.GIB


def diagnosis(path):
    recipe = load(path)
    return doctor.diagnose(recipe.backend, recipe, path)


@pytest.fixture
def large(monkeypatch):
    """A machine that can build anything."""
    monkeypatch.setattr(doctor, "host_memory", lambda: (400 * GIB, 500 * GIB))
    monkeypatch.setattr(doctor, "_disk", lambda path: 9000 * GIB)


def test_diagnose_without_the_sdk_says_what_is_missing_and_where_it_is(large):
    """The recipe's needs are told all the same: they come from its lock."""
    found = diagnosis(RECIPES / "llama-70b-spec.yaml")
    where, what, fix = next((p.where, p.what, p.fix) for p in found.problems if p.what.startswith("not installed"))
    assert where == "packages"
    assert "torch-neuronx, neuronx-distributed, libneuronxla, neuronx-cc" in what
    assert "--extra-index-url https://pip.repos.neuron.amazonaws.com" in fix
    assert found.facts["device"] == {"device": "none"}
    assert found.facts["recipe"]["graphs"].endswith("compiled for 64 ranks")
    assert found.facts["recipe"]["memory on a rank"].endswith("GiB of 24 GiB on a core")


def test_diagnose_of_a_model_that_does_not_fit_its_cores(large, tmp_path):
    text = (RECIPES / "llama-70b-spec.yaml").read_text()
    (tmp_path / "llama-70b-spec.yaml").write_text(text.replace("tensor: 64", "tensor: 2"))
    shutil.copy(RECIPES / "llama-70b-spec.lock", tmp_path)
    shutil.copytree(RECIPES / "bases", tmp_path / "bases")
    found = diagnosis(tmp_path / "llama-70b-spec.yaml")
    assert any("target weights" in p.what and "24 GiB" in p.what for p in found.problems)


@pytest.mark.parametrize(
    ("memory", "disk", "says"),
    [
        ((2, 4), 9000, "the largest graph needs about * GiB to compile, this machine has 4.0"),
        ((2, 500), 9000, "the largest graph needs about * GiB to compile, 2.0 GiB are available"),
        ((400, 500), 20, "the files need about * GiB, with equal files counted once; the cache's disk has 20.0 free"),
        ((400, 500), 9000, None),
    ],
)
def test_diagnose_holds_a_plan_against_memory_and_disk(monkeypatch, memory, disk, says):
    monkeypatch.setattr(doctor, "host_memory", lambda: tuple(size * GIB for size in memory))
    monkeypatch.setattr(doctor, "_disk", lambda path: disk * GIB)
    found = [p for p in diagnosis(RECIPES / "llama-70b-spec.yaml").problems if p.where.startswith("machine.")]
    expected = [] if says is None else [says.split("*")]
    assert len(found) == len(expected)
    for problem, (start, end) in zip(found, expected, strict=True):
        assert problem.what.startswith(start)
        assert problem.what.endswith(end)
        assert problem.fix


PICO = (RECIPES / "pico-spec.yaml").read_text().replace("prompts/pico.jsonl", "prompts/default.jsonl")


def test_doctor_plans_a_recipe_without_a_lock(tmp_path, monkeypatch):
    """It said `no lock; for a plan, run: tandem recipe lock`, though `tandem plan` needs none."""
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine.yaml").write_text(PICO)
    assert diagnosis(tmp_path / "mine.yaml").facts["recipe"]["graphs"].endswith("compiled for 1 rank")
    (tmp_path / "mine.yaml").write_text(PICO.replace("pico://llama?layers=2", "hf://org/name@main"))
    assert "tandem plan" in diagnosis(tmp_path / "mine.yaml").facts["recipe"]["plan"]


def test_doctor_of_a_broken_lock_blames_the_recipe(tmp_path):
    """It ended with `this machine cannot build or run this` and exit code 3."""
    (tmp_path / "mine.yaml").write_text(PICO)
    (tmp_path / "mine.lock").write_text("{")
    result = invoke("doctor", tmp_path / "mine.yaml")
    assert result.exit_code == 2
    assert "mine.lock:" in result.stderr


def test_doctor_lists_the_commands_and_no_fact_twice():
    facts = json.loads(invoke("doctor", "--json").stdout)["facts"]
    assert facts["commands"]["pull, verify, ls"] == "yes"
    assert facts["commands"]["sign, --require-signature"] == "yes"
    assert not facts["packages"].keys() & facts["device"].keys()


def test_doctor_of_a_machine_that_only_pulls(monkeypatch):
    """It printed a problem alone, with exit code 3, where pull, verify and sign work."""
    monkeypatch.setitem(base.BACKENDS, "inductor", "absent_backend:Backend")
    result = invoke("doctor")
    assert result.exit_code == 0
    assert re.search(r"pull, verify, ls +yes", result.stdout)
    assert invoke("doctor", "--backend", "inductor").exit_code == 3


def test_doctor_of_a_host_with_sdk_and_device(tmp_path):
    words = ["doctor", "--backend", "neuron", "--target", "trn2", "--lnc", "2"]
    done = tandem(*words, "--json", where=environment(FAKE_NEURON_LS=DEVICE), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["problems"] == []
    assert found["facts"]["device"] == {"device": "neuron", "chip": "trn2", "lnc": "2"}
    assert found["facts"]["packages"]["neuronx-cc"] == "2.24.8799.0"


def test_doctor_ends_with_the_environment_s_exit_code_and_names_each_fix(tmp_path):
    words = ["doctor", "--backend", "neuron", "--target", "trn2", "--lnc", "2"]
    done = tandem(*words, where=environment(NEURON_CC_FLAGS="-O3"), cwd=tmp_path)
    assert done.returncode == 3
    assert "problem   environment: NEURON_CC_FLAGS='-O3' is set" in done.stdout
    assert "  fix: unset NEURON_CC_FLAGS, and write the flags into backend.flags" in done.stdout
