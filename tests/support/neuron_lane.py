"""Where the fakes of the Neuron SDK are, and how a process is started that finds them; this process never does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

from support import preloaded
from support.paths import ROOT, TESTS

FAKE, FAKE_NXD, FAKE_NXDI = TESTS / "fake_neuron", TESTS / "fake_nxd", TESTS / "fake_nxdi"
NXD_SOURCE = os.environ.get("TANDEM_NXD_SOURCE")
NXD = [Path(NXD_SOURCE)] if NXD_SOURCE else [FAKE_NXD]
"""The real neuronx-distributed where its source is named, otherwise its fake."""
DEVICE = "trn2.48xlarge 2 4"
"""What the fake neuron-ls reports: instance type, lnc, cores."""


XLA = {"PJRT_DEVICE": "CPU", "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}
"""XLA's CPU compiles quickly: a graph runs once or twice."""


def environment(*, nxd: list[Path] | None = None, **more: str) -> dict[str, str]:
    """Variables of a process that has the fake SDK; `nxd` replaces the fake of neuronx-distributed."""
    paths = [ROOT, TESTS, *(nxd or [FAKE_NXD]), FAKE]
    dropped = ("NEURON_", "XLA_", "FAKE_", "PJRT_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PATH": os.pathsep.join([str(FAKE / "bin"), kept.get("PATH", "")]),
        **XLA,
        **more,
    }


def run(code: str, where: dict[str, str], timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    return preloaded.run(code, env=where, timeout=timeout)


def tandem(*words: str, where: dict[str, str], cwd: Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    code = "from pipeline.cli.main import main; main()"
    return preloaded.run(code, *words, env=where, cwd=cwd, timeout=timeout)


def messages():
    """The fake's protobuf messages of HLO, without importing the fake SDK."""
    path = FAKE / "torch_neuronx/xla_impl/lower_eager.py"
    spec = importlib.util.spec_from_file_location("fake_hlo_messages", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HloModuleProto
