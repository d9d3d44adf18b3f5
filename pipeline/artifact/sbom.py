"""The SBOM of a build: CycloneDX 1.6 JSON, by cyclonedx-python-lib, which is not part of a base install.

Imported where artifacts are built, never where they are pulled or inspected. The same packages, toolchain and time
give the same bytes: the serial number is derived from the components.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib import metadata
from typing import Any

from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from pipeline import __version__
from pipeline.errors import no_string

ROOTS = ("torch", "transformers", "safetensors", "tokenizers", "gguf", "numpy", "neuronx-cc", "neuronx-distributed",
         "torch-neuronx", "pydantic", "ruamel.yaml", "click", "filelock", "rich")  # fmt: skip
COMPILERS = ("cxx", "neuronx-cc", "cuda")
"""Entries of a toolchain that are listed beside the Python packages."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def sbom(created: str, toolchain: Mapping[str, str]) -> dict[str, Any]:
    """Return the CycloneDX document of the installed packages that build artifacts, and of the compilers."""
    tandem = Component(type=ComponentType.APPLICATION, name="tandem", version=__version__, bom_ref="tandem")
    packages = installed(ROOTS)
    libraries = {key: _library(package) for key, package in packages.items()}
    bom = Bom(
        metadata=BomMetaData(component=tandem, timestamp=datetime.fromisoformat(created)),
        components=[*libraries.values(), *_compilers(toolchain)],
    )
    bom.register_dependency(tandem, [libraries[key] for key in map(_key, ROOTS) if key in libraries])
    for key, package in packages.items():
        bom.register_dependency(libraries[key], [libraries[need] for need in package.needs if need in libraries])
    bom.serial_number = _serial(created, bom.components)
    document: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    return document


@dataclass(frozen=True)
class Package:
    """An installed Python package; `needs` are the normalised names of its requirements without extras."""

    name: str
    version: str
    needs: tuple[str, ...]


def installed(roots: Iterable[str]) -> dict[str, Package]:
    """Return the installed packages among these and their requirements, by normalised name; extras are left out."""
    no_string(roots, "roots", "packages")
    packages: dict[str, Package] = {}
    queue = list(roots)
    while queue:
        package = _package(_key(queue.pop()))
        if package and _key(package.name) not in packages:
            packages[_key(package.name)] = package
            queue += package.needs
    return packages


@cache
def _package(key: str) -> Package | None:
    """Return an installed package; read once per process, because parsing all packages' metadata takes 0.4 s."""
    try:
        found = metadata.distribution(key)
    except metadata.PackageNotFoundError:
        return None
    required = (need for need in found.requires or () if "extra ==" not in need)
    needs = tuple(_key(match[0]) for need in required if (match := NAME.match(need)))
    return Package(found.metadata["Name"], found.version, needs)


def _key(name: str) -> str:
    """Return a package's name as packaging.python.org/specifications/name-normalization writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _library(package: Package) -> Component:
    purl = PackageURL("pypi", name=package.name, version=package.version)
    return Component(
        type=ComponentType.LIBRARY, name=package.name, version=package.version, purl=purl, bom_ref=str(purl)
    )


def _compilers(toolchain: Mapping[str, str]) -> list[Component]:
    return [
        Component(type=ComponentType.APPLICATION, name=name, version=version, bom_ref=name)
        for name, version in toolchain.items()
        if name in COMPILERS
    ]


def _serial(created: str, components: Iterable[Component]) -> uuid.UUID:
    """Return an id that depends on nothing but the contents: a random one would make equal builds differ."""
    contents = [
        __version__,
        created,
        *sorted(f"{component.bom_ref.value}@{component.version}" for component in components),
    ]
    return uuid.uuid5(uuid.NAMESPACE_URL, "\n".join(["urn:tandem:sbom", *contents]))
