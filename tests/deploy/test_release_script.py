"""Registries of the release scripts and workflows: every kind that stores accept, and a login where one is needed."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from pipeline.stores.base import STORES
from support.paths import ROOT


@pytest.mark.parametrize("path", ["docs/how-to/ci.md", "scripts/ci/release.sh", ".github/workflows/release.yml",
                                  ".github/workflows/promote.yml"])  # fmt: skip
def test_places_that_list_registries_list_every_kind(path):
    """The workflows and their page left out OCI registries. A list is a line that names one of the remote kinds."""
    listed = [line for line in (ROOT / path).read_text().splitlines() if "s3://bucket/prefix" in line]
    assert listed
    for line in listed:
        assert set(re.findall(r"(\w+)://", line)) == set(STORES) - {"file"}, line


def test_release_logs_in_to_the_oci_registries_of_a_step(tmp_path):
    """Only to those, with the password on standard input: arguments are visible to other processes."""
    for name, script in {"docker": 'echo "$@ : $(cat)" >> "$LOG"', "tandem": 'echo "$@" >> "$LOG"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    given = {"FROM": "oci://ghcr.io/org/staging", "TO": "s3://prod", "POLICY": "p", "OCI_USERNAME": "me"}
    given |= {"OCI_PASSWORD": "secret", "LOG": str(tmp_path / "log"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "scripts/ci/release.sh"), "promote", "small@1.0"]
    subprocess.run(command, env=given, check=True)
    assert (tmp_path / "log").read_text().splitlines() == [
        "login --username me --password-stdin ghcr.io : secret",
        "copy oci://ghcr.io/org/staging/small@1.0 s3://prod --policy p",
    ]
    subprocess.run(command, env=given | {"OCI_PASSWORD": ""}, check=True)
    assert len((tmp_path / "log").read_text().splitlines()) == 3, "no login without a password"
