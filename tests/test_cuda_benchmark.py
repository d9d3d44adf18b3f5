"""`benchmarks/cuda.py` on a machine without a GPU: its error, its limits, and all of its steps with the tiny pair."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from support.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "cuda.py"


def script(*arguments, limit_s=280):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=limit_s, check=False
    )


@pytest.fixture
def module():
    """The script as a module; it runs nothing when it is imported."""
    spec = importlib.util.spec_from_file_location("cuda_benchmark", SCRIPT)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    yield loaded
    del sys.modules[spec.name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_cuda_names_what_a_machine_lacks_and_runs_no_step(tmp_path):
    done = script("--out", tmp_path / "cuda.json")
    assert done.returncode == 1
    assert done.stderr.startswith("this machine lacks:\nbackend.device: device is cuda, but no GPU is available")
    assert list(json.loads((tmp_path / "cuda.json").read_text())["steps"]) == ["machine"]


def test_a_step_out_of_time_is_killed_and_has_its_output(module, tmp_path):
    found = module.run_step(module.Run(tmp_path, ("--device", "cpu", "--tiny")), module.Step("machine", 60), 0.2)
    assert found["status"] == "out of time"
    assert found["seconds"] < 30
    assert list(found["output"]) == ["machine.log"]


@pytest.mark.slow
def test_a_failed_step_has_the_end_of_its_output_and_of_its_graphs(module, tmp_path):
    """A step whose artifact is missing, and logs that a compile left."""
    run = module.Run(tmp_path, ("--device", "cpu", "--tiny"))
    logs = tmp_path / "cache" / "logs" / "pico-spec"
    logs.mkdir(parents=True)
    (logs / "decode.log").write_text("\n".join(f"line {number}" for number in range(100)))
    found = module.run_step(run, module.Step("gates pico", 60), 200)
    assert (found["status"], found["exit_code"]) == ("failed", 1)
    assert "No such file" in found["output"]["gates-pico.log"][-1] or "not an artifact" in str(found["output"])
    assert len(module.ends(run, tmp_path / "gates-pico.log", 0)["decode.log"]) == module.SHOWN_LINES


def test_steps_without_what_they_need_are_left_out_and_the_rest_runs(module, tmp_path):
    """No time for any step but the first: the file has all of them, with the reason."""
    run = module.Run(tmp_path, ("--device", "cpu", "--tiny"))
    steps = module.run_all(run, tmp_path / "cuda.json", module.END_S + 0.0)
    assert {found["status"] for found in steps.values()} == {"left out"}
    assert steps["gates pico"]["why"] == "needs build pico"
    assert json.loads((tmp_path / "cuda.json").read_text())["steps"] == steps


@pytest.mark.slow
def test_cuda_runs_every_step_on_a_cpu_with_the_tiny_pair(tmp_path):
    done = script("--device", "cpu", "--tiny", "--out", tmp_path / "cuda.json", "--total", 1500, limit_s=1510)
    steps = json.loads((tmp_path / "cuda.json").read_text())["steps"]
    assert {name: found["status"] for name, found in steps.items() if found["status"] != "ok"} == {}
    assert done.returncode == 0, done.stderr
    assert set(steps["decode pair"]["result"]["tokens_per_s"]) == {"plain", "K=2", "transformers"}
    assert {"artifact", "eager", "torch.compile"} == set(steps["steps pair"]["result"]["step_ms"]["decode-b4-t1-s64"])
