"""The SBOM: the installed packages with their purls and requirements, the compilers, and nothing random."""

from __future__ import annotations

import json
from importlib import metadata

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from pipeline.artifact.sbom import sbom

CREATED = "2026-11-28T12:00:00Z"
TOOLCHAIN = {"cxx": "g++ 13.3.0", "torch": "2.13.0", "cuda": "13.0"}


def test_sbom_is_valid_cyclonedx():
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(sbom(CREATED, TOOLCHAIN))) is None


def test_sbom_is_reproducible():
    """Equal builds give equal bytes; cyclonedx-python-lib draws a random serial number and the present time."""
    again = sbom(CREATED, dict(reversed(TOOLCHAIN.items())))
    assert json.dumps(sbom(CREATED, TOOLCHAIN)) == json.dumps(again)


def test_sbom_serial_number_depends_on_the_contents():
    serials = {
        sbom(created, toolchain)["serialNumber"]
        for created, toolchain in [
            (CREATED, TOOLCHAIN),
            ("2026-11-29T12:00:00Z", TOOLCHAIN),
            (CREATED, TOOLCHAIN | {"cxx": "g++ 14.1.0"}),
        ]
    }
    assert len(serials) == 3


def test_sbom_lists_packages_and_compilers():
    components = {each["name"]: each for each in sbom(CREATED, TOOLCHAIN)["components"]}
    version = metadata.version("PyYAML")
    purl = f"pkg:pypi/pyyaml@{version}"
    assert components["PyYAML"] == {
        "type": "library", "name": "PyYAML", "version": version, "purl": purl, "bom-ref": purl
    }  # fmt: skip
    compilers = {name: each["version"] for name, each in components.items() if each["type"] == "application"}
    assert compilers == {"cxx": "g++ 13.3.0", "cuda": "13.0"}


def test_sbom_tells_what_needs_what():
    needs = {each["ref"]: each.get("dependsOn", []) for each in sbom(CREATED, TOOLCHAIN)["dependencies"]}
    pydantic = f"pkg:pypi/pydantic@{metadata.version('pydantic')}"
    assert pydantic in needs["tandem"]
    assert f"pkg:pypi/pydantic-core@{metadata.version('pydantic-core')}" in needs[pydantic]
