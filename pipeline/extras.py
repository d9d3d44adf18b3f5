"""Extras of the distribution: which are missing for a command, and the command that installs them.

Imports none of their packages.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterable
from importlib import metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from pipeline.errors import HostError, no_string

DISTRIBUTION = "tandem-spec"
"""Name on PyPI. The name `tandem` belongs to another project there."""

MODULES = {
    "s3": ("obstore", "boto3"),
    "hub": ("huggingface_hub",),
    "oci": ("urllib3",),
    "sign": ("model_signing", "OpenSSL"),
    "inductor": ("torch", "safetensors", "tokenizers", "transformers"),
    "neuron": ("safetensors", "tokenizers", "transformers"),
    "stablehlo": ("torch_mlir", "jaxlib"),
    "vllm": ("vllm",),
    "ray": ("ray",),
}
"""The modules that identify an extra: those that its commands import first."""


SERVE_VENV = ".venv-serve"
"""Folder of a new environment for machines that serve, in the current folder."""

PROFILES = {
    "vllm": ("serve", {"inductor", "s3", "hub", "oci", "sign"}),
    "inductor": ("build", {"s3", "hub", "oci", "sign"}),
    "neuron": ("build-neuron", {"s3", "oci", "sign"}),
}
"""Extra -> the install profile that is made for it, which hints name instead, and the other extras of that profile."""


BESIDE_TORCH = ("torchvision", "torchaudio", "torchcodec")
"""Packages with extensions of torch that vLLM requires."""
CUDA_LIBRARY = "libtorch_cuda.so"
"""Part of a torch for CUDA, which extensions that were built for it name."""


def require(extras: Iterable[str], where: str) -> None:
    """Check that extras are installed; `where` names what needs them.

    Raises:
        HostError: some are not; the message names all of them, and the fix installs all of them.

    """
    no_string(extras, "extras", "extras")
    missing = {extra: absent for extra in dict.fromkeys(extras) if (absent := _absent(extra))}
    if missing:
        names = ", ".join(dict.fromkeys(name for absent in missing.values() for name in absent))
        raise HostError(f"packages not installed: {names}", where=where, fix=install_command(*missing))


def missing_package(error: ModuleNotFoundError) -> HostError | None:
    """Return the error for a failed import of an extra's package, with the command that installs it; else None."""
    module = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in MODULES.items() if module in modules), None)
    if extra is None:
        return None
    names = ", ".join(dict.fromkeys((module, *_absent(extra))))
    return HostError(f"packages not installed: {names}", where="this environment", fix=install_command(extra))


def install_command(*extras: str) -> str:
    """Return the command that installs extras, from the place that Tandem was installed from.

    They go into this environment. The profile with vLLM goes into a new one if this one has PyTorch, whose version vLLM
    would replace.
    """
    if "vllm" in extras and find_spec("torch") is not None and find_spec("vllm") is None:
        serve, _ = PROFILES["vllm"]
        return f"python3 -m venv {SERVE_VENV} && {SERVE_VENV}/bin/pip install {shlex.join(_requirement(serve))}"
    return f"{_pip('install')} {shlex.join(_requirement(','.join(_with_profiles(extras))))}"


def _with_profiles(extras: Iterable[str]) -> list[str]:
    """Return the profiles that are made for extras, and the extras that none of these profiles has."""
    wanted = list(extras)
    profiles = []
    for extra, (profile, others) in PROFILES.items():
        if extra in wanted:
            profiles.append(profile)
            wanted = [each for each in wanted if each != extra and each not in others]
    return [*profiles, *wanted]


def of_another_torch() -> list[str]:
    """Return packages whose libraries need torch for CUDA where torch is that for CPUs: imports of them fail.

    vLLM's packages for CPUs require them, and an index serves those for CUDA.
    """
    torch = find_spec("torch")
    if torch is None or torch.origin is None or (Path(torch.origin).parent / "lib" / CUDA_LIBRARY).exists():
        return []
    return [name for name in BESIDE_TORCH if _needs_cuda(name)]


def error_of_another_torch(where: str) -> HostError | None:
    """Return the error for packages of another torch, with the command that removes them; None if there are none."""
    others = of_another_torch()
    what = f"{', '.join(others)}: built for torch with CUDA, and this torch is for CPUs; imports fail"
    return HostError(what, where=where, fix=f"{_pip('uninstall')} {' '.join(others)}") if others else None


def _needs_cuda(package: str) -> bool:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return False
    libraries = Path(spec.origin).parent.rglob("*.so")
    return any(CUDA_LIBRARY.encode() in library.read_bytes() for library in libraries)


def state(extra: str) -> str:
    """Return `yes` if an extra is installed, or else `no` with the command that installs it."""
    return f"no; to install: {install_command(extra)}" if _absent(extra) else "yes"


def _absent(extra: str) -> list[str]:
    return [module for module in MODULES[extra] if find_spec(module) is None]


def _pip(action: Literal["install", "uninstall"]) -> str:
    """Return the command of this environment's installer: a plain `pip` can be that of another environment."""
    found, words = shutil.which("pip"), "install" if action == "install" else "uninstall --yes"
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        return f"pip {words}"
    python = shlex.quote(sys.executable)
    # Not `find_spec`: setuptools answers it as an import of pip, and then fails its own import, which compilers need.
    return f"{python} -m pip {words}" if PathFinder.find_spec("pip") else f"uv pip {action} --python {python}"


def _requirement(extras: str) -> list[str]:
    """Return pip's arguments for Tandem with extras, as PEP 610 records where Tandem came from."""
    origin = _origin()
    url = str(origin.get("url", ""))
    path = Path(unquote(urlsplit(url).path))
    if not url or (url.startswith("file:") and not path.exists()):
        return [f"{DISTRIBUTION}[{extras}]"]
    if "dir_info" in origin:
        return [*(["-e"] if origin["dir_info"].get("editable") else []), f"{path}[{extras}]"]
    if "vcs_info" in origin:
        url = f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
    return [f"{DISTRIBUTION}[{extras}] @ {url}"]


def _origin() -> dict[str, Any]:
    """Return `direct_url.json` of the installed distribution; empty if it came from an index."""
    try:
        text = metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except metadata.PackageNotFoundError:  # this code runs from a folder that was never installed
        folder = Path(__file__).parents[1]
        is_clone = (folder / "pyproject.toml").is_file()
        return {"url": folder.as_uri(), "dir_info": {"editable": True}} if is_clone else {}
    return dict(json.loads(text)) if text else {}
