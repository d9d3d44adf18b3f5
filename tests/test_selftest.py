"""`tandem neuron selftest` without a device: what is refused, and what the file says of a step that fails."""

import json

import pytest

from pipeline import selftest as trial
from pipeline.backends.neuron.support import Device
from pipeline.errors import GateError, HostError, InputError
from pipeline.recipe.backend_settings import NeuronSettings
from pipeline.recipe.schema import Recipe

SETTINGS = NeuronSettings(name="neuron", target="trn2", lnc=2)


def test_host_without_a_device_is_refused(monkeypatch):
    monkeypatch.setattr(trial, "device", lambda: None)
    with pytest.raises(HostError, match="no Neuron device on this host"):
        trial.chip_of_host()


def test_unknown_instance_is_refused_with_the_chips(monkeypatch):
    monkeypatch.setattr(trial, "device", lambda: Device("xyz9.48xlarge", 64, 2, 1))
    with pytest.raises(InputError, match="unknown instance type 'xyz9") as caught:
        trial.chip_of_host()
    assert "--target trn1 or trn2" in caught.value.fix


def test_chip_and_lnc_are_those_of_the_host(monkeypatch):
    monkeypatch.setattr(trial, "device", lambda: Device("trn2.48xlarge", 64, 2, 1))
    assert trial.chip_of_host() == {"target": "trn2", "lnc": 2}


@pytest.mark.parametrize("pair", trial.PAIRS)
def test_pairs_are_recipes_of_the_backend(pair):
    assert Recipe.model_validate(trial.PAIRS[pair] | {"backend": SETTINGS}).backend == SETTINGS


def test_file_has_every_step_up_to_a_failure_of_each_pair(monkeypatch, tmp_path):
    """Written after each step, so that a crash keeps those before."""
    written = []

    def failing():
        written.append(json.loads((tmp_path / "selftest.json").read_bytes()))
        raise HostError("NCC_EOOM001: no memory", where="neuronx-cc", fix="a smaller bucket")

    def crashing():
        raise RuntimeError("nrt_init failed")

    steps = {
        "selftest-pico": {"build": lambda: {"graphs": ["decode"]}, "gates": failing, "latency": crashing},
        "selftest-smollm2": {"build": crashing},
    }
    monkeypatch.setattr(trial, "_steps", lambda build: steps[build.recipe.name])
    made = trial.selftest(SETTINGS, tmp_path / "selftest.json", tmp_path)
    shown = json.loads((tmp_path / "selftest.json").read_bytes())
    assert [(of["pair"], of["step"]) for of in shown["steps"]] == [
        ("pico", "build"), ("pico", "gates"), ("smollm2", "build"),
    ]  # fmt: skip
    assert shown["steps"][1]["error"] == {
        "where": "neuronx-cc", "what": "NCC_EOOM001: no memory", "fix": "a smaller bucket",
    }  # fmt: skip
    assert shown["steps"][2]["error"]["what"] == "nrt_init failed"
    assert [of["step"] for of in written[0]["steps"]] == ["build"]
    assert [of.pair for of in made.failed] == ["pico", "smollm2"]
    assert shown["machine"]["machine"]["cores"]
    assert "not installed" in shown["problems"][0]["what"], "the SDK is absent here"


def test_failed_gates_are_a_result_with_their_findings(monkeypatch, tmp_path):
    """The verdicts were lost with the error that a build ends with."""
    verdicts = [{"name": "parity", "passed": False, "findings": ["token 3"]}]
    report = {"passed": False, "gates": verdicts, "provenance": {"ran_on": {"chip": "trn2"}}}

    def failing(build):
        (build.out / "reports").mkdir(parents=True)
        (build.out / "reports/parity.json").write_text(json.dumps(report))
        raise GateError("failed", where="pico", fix="")

    monkeypatch.setattr(trial, "run", failing)
    gates = {"gates": trial._steps}
    monkeypatch.setattr(trial, "_steps", lambda build: {"gates": gates["gates"](build)["gates"]})
    made = trial.selftest(SETTINGS, tmp_path / "selftest.json", tmp_path, ("pico",))
    assert made.failed[0].failure == "gates failed"
    shown = json.loads((tmp_path / "selftest.json").read_text())["steps"][0]["facts"]
    assert shown == {"passed": False, "gates": verdicts, "ran_on": {"chip": "trn2"}}
