"""What this host has of the Neuron SDK, and what is wrong with it, before an hour is spent. Imports no torch.

Versions are those of the SDK's release manifest (aws-neuron-sdk, n2-manifest.json); that PyTorch/XLA and NxD end with
SDK 2.31 is announced in "NxD Inference and NxD Core maintenance support with Neuron SDK 2.31" (August 2026).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from pipeline.errors import Problem
from pipeline.recipe.chips import CHIPS, chip_of_instance

COMPILER = "neuronx-cc"
INDEX = "https://pip.repos.neuron.amazonaws.com"


@dataclass(frozen=True)
class Release:
    """An SDK release that this backend can use, and the versions of its packages up to where they must agree."""

    sdk: str
    compiler: str
    torch_neuronx: str
    distributed: str
    chips: tuple[str, ...]

    def install(self) -> str:
        """The command that installs it."""
        packages = {
            COMPILER: self.compiler,
            "torch-neuronx": self.torch_neuronx,
            "neuronx-distributed": self.distributed,
        }
        listed = " ".join(f"'{name}=={version}.*'" for name, version in packages.items())
        return f"pip install --extra-index-url {INDEX} {listed}"


RELEASES = (
    Release("2.28", "2.23", "2.9.0.2.12", "0.17", tuple(CHIPS)),
    Release("2.29", "2.24", "2.9.0.2.13", "0.18", tuple(CHIPS)),
    Release("2.30", "2.25", "2.9.0.2.14", "0.19.28093", tuple(CHIPS)),
    Release("2.31", "2.26", "2.9.0.2.15", "0.19.28492", tuple(CHIPS)),
)
"""Newest last. SDK 2.32 has no torch-neuronx and no NxD; its set-up page pairs its compiler 2.27 with those of 2.31."""

LATER_COMPILERS = ("2.27",)
TORCH = "2.9"
PYTHONS = ((3, 11), (3, 12))
"""Python versions of every release above that this package runs on too."""

PACKAGES = ("torch", "torch-xla", "torch-neuronx", "neuronx-distributed", "libneuronxla", COMPILER)
PLACEHOLDERS = {
    "torch-neuronx": "1.0",
    "libneuronxla": "1.0",
    "neuronx-cc": "1.0.post1",
    "neuronx-distributed": "0.1",
    "neuronx-distributed-inference": "0.1.0",
}
"""Versions on PyPI that hold one empty module: they keep the names, the packages are in AWS's own index."""

AT_START = dict(os.environ)
"""The environment before the SDK is imported: torch-xla and NxD set variables that are not the user's."""

TRACE_ENVIRONMENT = ("XLA_", "NEURON_")
HARMLESS = (
    "NEURON_RT_", "NEURON_COMPILE_CACHE", "NEURON_CPP_LOG", "NEURON_PLATFORM_TARGET_OVERRIDE",
    "NEURON_LOGICAL_NC_CONFIG", "XLA_METRICS_FILE", "XLA_SAVE_TENSORS_FILE",
)  # fmt: skip
"""Variables that start the same and change no code; chip and logical core come from the recipe."""


@dataclass(frozen=True)
class Device:
    """Neuron devices of this host, as `neuron-ls` tells; cores are logical ones."""

    instance: str
    cores: int
    lnc: int
    core_bytes: int

    @property
    def chip(self) -> str:
        """The chip of the instance type."""
        return chip_of_instance(self.instance)


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide what a graph compiles to; `missing` where there is none."""
    return {name: _version(name) for name in PACKAGES}


def environment(values: Mapping[str, str] = AT_START) -> dict[str, str]:
    """Variables that change the code that tracing and compiling give."""
    return {
        name: value
        for name, value in sorted(values.items())
        if name.startswith(TRACE_ENVIRONMENT) and not name.startswith(HARMLESS) and name != "NEURON_CC_FLAGS"
    }


def device() -> Device | None:
    """The devices of this host; None without any, or without the tools."""
    tool = shutil.which("neuron-ls") or shutil.which("neuron-ls", path="/opt/aws/neuron/bin")
    if tool is None:
        return None
    try:
        out = subprocess.run([tool, "-j"], capture_output=True, text=True, check=True, timeout=60).stdout
        return parse_devices(json.loads(out))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def parse_devices(listed: Any) -> Device | None:
    """`neuron-ls --json-output`: one entry a device."""
    devices = listed if isinstance(listed, list) else listed.get("neuron_devices", [])
    if not devices:
        return None
    first = devices[0]
    cores = sum(int(one["nc_count"]) for one in devices)
    memory = int(first.get("memory_size", 0)) // max(int(first["nc_count"]), 1)
    lnc = int(first.get("logical_neuroncore_config", 1))
    return Device(str(first.get("instance_type", "unknown")), cores, lnc, memory)


def problems(chip: str, lnc: int, found: Mapping[str, str], values: Mapping[str, str] = AT_START) -> list[Problem]:
    """What keeps this host from building for `chip`; `found` are installed versions."""
    return [
        *_python_problems(),
        *_package_problems(found),
        *_version_problems(chip, found),
        *_compiler_problems(found),
        *_environment_problems(chip, lnc, values),
    ]


def run_problems(chip: str, lnc: int, ranks: int, here: Device | None) -> list[Problem]:
    """What keeps this host from running an artifact of `ranks` ranks for `chip`."""
    if here is None:
        return [Problem("device", "no Neuron device on this host", f"run on a {chip} instance")]
    found = []
    if here.chip != chip:
        what = f"the artifact is for {chip}, this host is {here.instance} ({here.chip})"
        found.append(Problem("device.chip", what, "pull or build the variant for this chip"))
    if here.lnc != lnc:
        what = f"the artifact needs lnc={lnc}, this host runs with {here.lnc}"
        found.append(Problem("device.lnc", what, f"export NEURON_LOGICAL_NC_CONFIG={lnc}, if the chip has it"))
    if here.cores < ranks:
        what = f"the artifact needs {ranks} cores, this host has {here.cores}"
        found.append(Problem("device.cores", what, "use a larger instance, or build with a smaller parallel.tensor"))
    return found


def release_of(distributed: str) -> Release | None:
    """The SDK release that a version of neuronx-distributed is of."""
    return next((r for r in reversed(RELEASES) if begins(distributed, r.distributed)), None)


def begins(version: str, *prefixes: str) -> bool:
    """True where the leading parts of a version are one of the prefixes."""
    parts = version.split("+")[0].split(".")
    return any(parts[: len(p.split("."))] == p.split(".") for p in prefixes)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _python_problems() -> Iterator[Problem]:
    here = sys.version_info[:2]
    if here not in PYTHONS:
        what = f"Python {here[0]}.{here[1]}, the Neuron packages come for {_listed(PYTHONS)}"
        yield Problem("python", what, "make the environment with one of these")


def _package_problems(found: Mapping[str, str]) -> Iterator[Problem]:
    absent = [name for name in PACKAGES if found.get(name, "missing") == "missing"]
    if absent:
        yield Problem("packages", f"not installed: {', '.join(absent)}", RELEASES[-1].install())
    for name, version in PLACEHOLDERS.items():
        if found.get(name) == version:
            what = f"{name} {version} is the empty placeholder of PyPI, not the SDK's package"
            yield Problem("packages", what, f"pip uninstall {name}, then {RELEASES[-1].install()}")


def _version_problems(chip: str, found: Mapping[str, str]) -> Iterator[Problem]:
    """The installed versions against the table: each known, all of one release, and a release that has the chip."""
    torch = found.get("torch", "missing")
    if torch != "missing" and not begins(torch, TORCH):
        what = f"torch {torch}; PyTorch/XLA on Neuron ends at torch {TORCH}"
        yield Problem("packages.torch", what, RELEASES[-1].install())
    distributed = found.get("neuronx-distributed", "missing")
    if distributed in ("missing", PLACEHOLDERS["neuronx-distributed"]):
        return
    release = release_of(distributed)
    if release is None:
        known = ", ".join(f"{r.distributed} (SDK {r.sdk})" for r in RELEASES)
        what = f"neuronx-distributed {distributed}; supported: {known}"
        yield Problem("packages.neuronx-distributed", what, RELEASES[-1].install())
        return
    if chip not in release.chips:
        yield Problem("packages", f"SDK {release.sdk} does not serve {chip}", f"use one that does: {_sdks(chip)}")
    wanted = {COMPILER: release.compiler, "torch-neuronx": release.torch_neuronx}
    for name, version in wanted.items():
        have = found.get(name, "missing")
        later = name == COMPILER and release is RELEASES[-1] and begins(have, *LATER_COMPILERS)
        if have not in ("missing", PLACEHOLDERS[name]) and not begins(have, version) and not later:
            what = f"{name} {have}; neuronx-distributed {distributed} is of SDK {release.sdk}, which has {version}.*"
            yield Problem(f"packages.{name}", what, release.install())


def _compiler_problems(found: Mapping[str, str]) -> Iterator[Problem]:
    have = found.get(COMPILER, "missing")
    if have not in ("missing", PLACEHOLDERS[COMPILER]) and shutil.which(COMPILER) is None:
        yield Problem("PATH", f"{COMPILER} {have} is installed but not on PATH", "activate its virtual environment")


def _environment_problems(chip: str, lnc: int, values: Mapping[str, str]) -> Iterator[Problem]:
    if values.get("NEURON_CC_FLAGS"):
        what = f"NEURON_CC_FLAGS={values['NEURON_CC_FLAGS']!r} is set; flags outside the recipe are not used"
        yield Problem("environment", what, "unset it, and write the flags into backend.flags")
    expected = {"NEURON_PLATFORM_TARGET_OVERRIDE": chip, "NEURON_LOGICAL_NC_CONFIG": str(lnc)}
    for name, value in expected.items():
        if values.get(name, value) != value:
            what = f"{name}={values[name]}, the recipe says {value}"
            yield Problem("environment", what, f"unset {name}; the recipe decides")


def _sdks(chip: str) -> str:
    return ", ".join(r.sdk for r in RELEASES if chip in r.chips)


def _listed(pythons: tuple[tuple[int, int], ...]) -> str:
    return " and ".join(f"{major}.{minor}" for major, minor in pythons)


def sdk_variables(target: str, lnc: int) -> dict[str, str]:
    """By which the SDK's own code learns the chip where there is none."""
    return {"NEURON_PLATFORM_TARGET_OVERRIDE": target, "NEURON_LOGICAL_NC_CONFIG": str(lnc)}


@contextmanager
def sdk_environment(target: str, lnc: int) -> Iterator[None]:
    """Set `sdk_variables`; restored afterwards."""
    wanted = sdk_variables(target, lnc)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
