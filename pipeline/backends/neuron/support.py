"""Check this host's Neuron SDK before a build starts: packages, versions, devices, environment. Imports no torch.

Versions are those of the SDK's release manifest (aws-neuron-sdk, n2-manifest.json); that PyTorch/XLA and NxD end with
SDK 2.31 is announced in "NxD Inference and NxD Core maintenance support with Neuron SDK 2.31" (August 2026).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pipeline.errors import HostError, Problem
from pipeline.extras import install_command
from pipeline.files.limits import parse_json
from pipeline.recipe.chips import CHIPS, chip_of_instance

COMPILER = "neuronx-cc"
PRODUCT = Path("/sys/devices/virtual/dmi/id/product_name")
"""The instance type on EC2."""
INDEX = "https://pip.repos.neuron.amazonaws.com"


MOST_DIGITS = 4
"""Limit for the digits of the number of cores that work as one."""


@dataclass(frozen=True)
class Release:
    """An SDK release that this backend supports, and the version prefixes of its packages."""

    sdk: str
    compiler: str
    torch_neuronx: str
    distributed: str
    chips: tuple[str, ...]

    def install(self) -> str:
        """Return the command that installs this release."""
        packages = {
            COMPILER: self.compiler,
            "torch-neuronx": self.torch_neuronx,
            "neuronx-distributed": self.distributed,
        }
        requirements = " ".join(f"'{name}=={version}.*'" for name, version in packages.items())
        return f"pip install --extra-index-url {INDEX} {requirements}"


RELEASES = (
    Release("2.28", "2.23", "2.9.0.2.12", "0.17", ("trn1", "trn2", "inf2")),
    Release("2.29", "2.24", "2.9.0.2.13", "0.18", tuple(CHIPS)),
    Release("2.30", "2.25", "2.9.0.2.14", "0.19.28093", tuple(CHIPS)),
    Release("2.31", "2.26", "2.9.0.2.15", "0.19.28492", tuple(CHIPS)),
)
"""Newest last. The compilers of SDK 2.32 and 2.33 go with torch-neuronx and NxD of 2.31, which are the last."""

LATER_COMPILERS = ("2.27", "2.28")
TORCH = "2.9"
PYTHONS = ((3, 11), (3, 12))
"""Python versions that this package and every release above support."""

PACKAGES = ("torch", "torch-xla", "torch-neuronx", "neuronx-distributed", "libneuronxla", COMPILER)
STABLEHLO_PACKAGES = {"torch-traced": "torch", "torch-mlir": "torch-mlir", "jaxlib": "jaxlib", COMPILER: COMPILER}
"""Packages that decide a graph's code with `frontend: stablehlo`, by their names in a toolchain.

A toolchain's `torch` is also the one that an artifact is loaded with; here it only traces.
"""
PLACEHOLDERS = {
    "torch-neuronx": "1.0",
    "libneuronxla": "1.0",
    "neuronx-cc": "1.0.post1",
    "neuronx-distributed": "0.1",
    "neuronx-distributed-inference": "0.1.0",
}
"""Placeholder versions on PyPI with one empty module; the packages are in AWS's own index."""

AT_START = dict(os.environ)
"""The environment before the SDK is imported: torch-xla and NxD set variables on import."""

TRACE_ENVIRONMENT = ("XLA_", "NEURON_")
HARMLESS = (
    "NEURON_RT_", "NEURON_COMPILE_CACHE", "NEURON_CPP_LOG", "NEURON_PLATFORM_TARGET_OVERRIDE",
    "NEURON_LOGICAL_NC_CONFIG", "XLA_METRICS_FILE", "XLA_SAVE_TENSORS_FILE",
)  # fmt: skip
"""Variables with these prefixes that change no code; chip and logical core come from the recipe."""


@dataclass(frozen=True)
class Device:
    """Neuron devices of this host, from `neuron-ls`; `cores` counts logical cores."""

    instance: str
    cores: int
    lnc: int
    core_bytes: int

    @property
    def chip(self) -> str:
        """Chip of the instance type."""
        return chip_of_instance(self.instance)


def versions(frontend: str = "xla") -> dict[str, str]:
    """Return installed versions of the packages that decide a graph's code; `missing` for those not installed."""
    packages = STABLEHLO_PACKAGES if frontend == "stablehlo" else {name: name for name in PACKAGES}
    return {name: _version(package) for name, package in packages.items()}


def environment(values: Mapping[str, str] = AT_START) -> dict[str, str]:
    """Return the variables that change the code of a graph."""
    return {
        name: value
        for name, value in sorted(values.items())
        if name.startswith(TRACE_ENVIRONMENT) and not name.startswith(HARMLESS) and name != "NEURON_CC_FLAGS"
    }


def device() -> Device | None:
    """Return the devices of this host; None without devices or without `neuron-ls`.

    Raises:
        HostError: the output of `neuron-ls` does not have the documented form.

    """
    tool = shutil.which("neuron-ls") or shutil.which("neuron-ls", path="/opt/aws/neuron/bin")
    if tool is None:
        return None
    listed, header = _printed([tool, "--json-output"]), _printed([tool])
    return None if listed is None else parse_devices(listed, header or "")


def parse_devices(listed: str, header: str, product: Path = PRODUCT) -> Device | None:
    """Return the devices in the output of `neuron-ls --json-output`: one entry per device, of logical cores.

    Instance type and LNC are not in it: they are lines above the table that `neuron-ls` prints without options, in
    newer versions. Else the type is the product name that the machine's firmware states, and the LNC the runtime's.

    Raises:
        HostError: the output is not a list of devices with `nc_count` and `memory_size`.

    """
    try:
        devices = [(int(entry["nc_count"]), int(entry["memory_size"])) for entry in parse_json(listed)]
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        what = f"its output is no list of devices with nc_count and memory_size: {listed.strip()[:200]!r}"
        fix = "please report this, with the output of `neuron-ls --json-output` and `neuron-ls --version`"
        raise HostError(what, where="neuron-ls", fix=fix) from error
    if not devices:
        return None
    facts = dict(re.findall(r"^(instance-type|logical-neuroncore-config):[ \t]*(\S+)[ \t]*$", header, re.MULTILINE))
    instance = facts.get("instance-type") or _product_name(product)
    lnc = facts.get("logical-neuroncore-config") or _runtime_lnc(chip_of_instance(instance))
    if not (lnc.isascii() and lnc.isdigit() and len(lnc) < MOST_DIGITS):
        fix = "correct the runtime's configuration, or NEURON_LOGICAL_NC_CONFIG: a whole number"
        raise HostError(f"found logical-neuroncore-config: {lnc[:40]!r}", where="neuron-ls", fix=fix)
    cores, memory_bytes = devices[0]
    return Device(instance, sum(count for count, _ in devices), int(lnc), memory_bytes // max(cores, 1))


def _printed(command: list[str]) -> str | None:
    """Return what a tool prints; None if it fails."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60, encoding="utf-8", errors="replace"
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _product_name(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or "unknown"
    except OSError:
        return "unknown"


def _runtime_lnc(chip: str) -> str:
    """Return the LNC of the Neuron runtime: that of its variable, else the chip's default."""
    default = next((entry.default_lnc for entry in CHIPS.values() if entry.name == chip), 1)
    return os.environ.get("NEURON_LOGICAL_NC_CONFIG", str(default))


def problems(chip: str, lnc: int, installed: Mapping[str, str], values: Mapping[str, str] = AT_START) -> list[Problem]:
    """Return what prevents a build for `chip` on this host; `installed` are versions by package."""
    return [
        *_python_problems(),
        *_package_problems(installed),
        *_version_problems(chip, installed),
        *_compiler_problems(installed),
        *_environment_problems(chip, lnc, values),
    ]


def stablehlo_problems(
    chip: str, lnc: int, installed: Mapping[str, str], values: Mapping[str, str] = AT_START
) -> list[Problem]:
    """Return what prevents a build with `frontend: stablehlo`: of the SDK it needs the compiler alone."""
    absent = [name for name in STABLEHLO_PACKAGES if installed.get(name, "missing") == "missing"]
    own = [STABLEHLO_PACKAGES[name] for name in absent if name != COMPILER]
    have, problems = installed.get(COMPILER, "missing"), []
    if own:
        problems.append(Problem("packages", f"not installed: {', '.join(own)}", install_command("stablehlo")))
    newest = LATER_COMPILERS[-1]
    install = f"pip install --extra-index-url {INDEX} '{COMPILER}=={newest}.*'"
    known = [*(release.compiler for release in RELEASES), *LATER_COMPILERS]
    if have == "missing":
        problems.append(Problem("packages", f"not installed: {COMPILER}", install))
    elif have == PLACEHOLDERS[COMPILER]:
        what = f"{COMPILER} {have} is an empty placeholder from PyPI, not the SDK's package"
        problems.append(Problem("packages", what, f"pip uninstall {COMPILER}, then {install}"))
    elif not begins(have, *known):
        problems.append(Problem(f"packages.{COMPILER}", f"found {have}; supported: {', '.join(known)}", install))
    return [*problems, *_compiler_problems(installed), *_environment_problems(chip, lnc, values)]


def run_problems(chip: str, lnc: int, ranks: int, device: Device | None) -> list[Problem]:
    """Return what prevents this host from running an artifact of `ranks` ranks for `chip`."""
    if device is None:
        return [Problem("device", "no Neuron device on this host", f"run on a {chip} instance")]
    problems = []
    if device.chip != chip:
        problem = f"the artifact is for {chip}, this host is {device.instance} ({device.chip})"
        problems.append(Problem("device.chip", problem, "pull or build the variant for this chip"))
    if device.lnc != lnc:
        problem = f"the artifact needs lnc={lnc}, this host runs with {device.lnc}"
        problems.append(Problem("device.lnc", problem, f"export NEURON_LOGICAL_NC_CONFIG={lnc}, if the chip has it"))
    if device.cores < ranks:
        problem = f"the artifact needs {ranks} cores, this host has {device.cores}"
        problems.append(
            Problem("device.cores", problem, "use a larger instance, or build with a smaller parallel.tensor")
        )
    return problems


def release_of(distributed: str) -> Release | None:
    """Return the SDK release that has a version of neuronx-distributed; None if unknown."""
    return next((r for r in reversed(RELEASES) if begins(distributed, r.distributed)), None)


def begins(version: str, *prefixes: str) -> bool:
    """Return whether a version starts with the parts of one of the prefixes."""
    parts = version.split("+")[0].split(".")
    return any(parts[: len(p.split("."))] == p.split(".") for p in prefixes)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _python_problems() -> Iterator[Problem]:
    version = sys.version_info[:2]
    if version not in PYTHONS:
        problem = f"found Python {version[0]}.{version[1]}; the Neuron packages support {_listed(PYTHONS)}"
        yield Problem("python", problem, "create the virtual environment with a supported Python")


def _package_problems(installed: Mapping[str, str]) -> Iterator[Problem]:
    absent = [name for name in PACKAGES if installed.get(name, "missing") == "missing"]
    if absent:
        yield Problem("packages", f"not installed: {', '.join(absent)}", RELEASES[-1].install())
    for name, version in PLACEHOLDERS.items():
        if installed.get(name) == version:
            problem = f"{name} {version} is an empty placeholder from PyPI, not the SDK's package"
            yield Problem("packages", problem, f"pip uninstall {name}, then {RELEASES[-1].install()}")


def _version_problems(chip: str, installed: Mapping[str, str]) -> Iterator[Problem]:
    """Check installed versions against the table: each is known, all are of one release, and it supports the chip."""
    torch = installed.get("torch", "missing")
    if torch != "missing" and not begins(torch, TORCH):
        problem = f"found torch {torch}; the last torch that PyTorch/XLA on Neuron supports is {TORCH}"
        yield Problem("packages.torch", problem, RELEASES[-1].install())
    distributed = installed.get("neuronx-distributed", "missing")
    if distributed in ("missing", PLACEHOLDERS["neuronx-distributed"]):
        return
    release = release_of(distributed)
    if release is None:
        supported = ", ".join(f"{r.distributed} (SDK {r.sdk})" for r in RELEASES)
        problem = f"found neuronx-distributed {distributed}; supported: {supported}"
        yield Problem("packages.neuronx-distributed", problem, RELEASES[-1].install())
        return
    if chip not in release.chips:
        yield Problem(
            "packages", f"SDK {release.sdk} does not support {chip}", f"use a release that supports it: {_sdks(chip)}"
        )
    versions = {COMPILER: release.compiler, "torch-neuronx": release.torch_neuronx}
    for name, version in versions.items():
        have = installed.get(name, "missing")
        later = name == COMPILER and release is RELEASES[-1] and begins(have, *LATER_COMPILERS)
        if have not in ("missing", PLACEHOLDERS[name]) and not begins(have, version) and not later:
            problem = f"found {name} {have}; SDK {release.sdk} (of neuronx-distributed {distributed}) has {version}.*"
            yield Problem(f"packages.{name}", problem, release.install())


def _compiler_problems(installed: Mapping[str, str]) -> Iterator[Problem]:
    have = installed.get(COMPILER, "missing")
    if have not in ("missing", PLACEHOLDERS[COMPILER]) and shutil.which(COMPILER) is None:
        yield Problem("PATH", f"{COMPILER} {have} is installed but not on PATH", "activate the virtual environment")


def _environment_problems(chip: str, lnc: int, values: Mapping[str, str]) -> Iterator[Problem]:
    if values.get("NEURON_CC_FLAGS"):
        problem = f"NEURON_CC_FLAGS={values['NEURON_CC_FLAGS']!r} is set; flags outside the recipe are not used"
        yield Problem("environment", problem, "unset NEURON_CC_FLAGS, and write the flags into backend.flags")
    expected = {"NEURON_PLATFORM_TARGET_OVERRIDE": chip, "NEURON_LOGICAL_NC_CONFIG": str(lnc)}
    for name, value in expected.items():
        if values.get(name, value) != value:
            problem = f"{name}={values[name]}, the recipe has {value}"
            yield Problem("environment", problem, f"unset {name}; a build takes the value from the recipe")


def _sdks(chip: str) -> str:
    return ", ".join(r.sdk for r in RELEASES if chip in r.chips)


def _listed(pythons: tuple[tuple[int, int], ...]) -> str:
    return " and ".join(f"{major}.{minor}" for major, minor in pythons)


def sdk_variables(target: str, lnc: int) -> dict[str, str]:
    """Return the variables that set the chip for the SDK on a host without one."""
    return {"NEURON_PLATFORM_TARGET_OVERRIDE": target, "NEURON_LOGICAL_NC_CONFIG": str(lnc)}


@contextmanager
def sdk_environment(target: str, lnc: int) -> Iterator[None]:
    """Set `sdk_variables`, and restore the environment on exit."""
    variables = sdk_variables(target, lnc)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
