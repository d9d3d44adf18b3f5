"""What provenance and the bill of materials say, as the standards' own libraries read them."""

from __future__ import annotations

import json

from pipeline.artifact.manifest import read
from pipeline.artifact.provenance import PROVENANCE, SBOM
from support import small_artifacts as small


def test_provenance_is_an_in_toto_statement(validated):
    """As the reference library reads it; every file but the two that tell of the build is a subject."""
    from google.protobuf.json_format import ParseDict
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import Statement

    data = json.loads((validated / PROVENANCE).read_text())
    Statement.copy_from_pb(ParseDict(data, statement_pb2.Statement())).validate()
    ParseDict(data["predicate"], provenance_pb2.Provenance())
    subjects = {one["name"]: one["digest"]["sha256"] for one in data["subject"]}
    listed = {name: entry.sha256 for name, entry in read(validated).manifest.files.items()}
    assert listed.keys() - subjects.keys() == {PROVENANCE, SBOM, "reports/parity.json"}
    assert all(listed[name] == sha256 for name, sha256 in subjects.items())
    assert data["predicate"]["buildDefinition"]["externalParameters"]["recipe"]["name"] == "small"


def test_provenance_names_the_workflow(tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_WORKFLOW_REF", "org/repo/.github/workflows/release.yml@refs/heads/main")
    monkeypatch.setenv("GITHUB_REPOSITORY", "org/repo")
    monkeypatch.setenv("GITHUB_RUN_ID", "17")
    monkeypatch.delenv("GITHUB_SERVER_URL", raising=False)
    root = small.make(tmp_path / "out", tmp_path / "work").root
    details = json.loads((root / PROVENANCE).read_text())["predicate"]["runDetails"]
    assert details["builder"]["id"] == "https://github.com/org/repo/.github/workflows/release.yml@refs/heads/main"
    assert details["metadata"]["invocationId"] == "https://github.com/org/repo/actions/runs/17/attempts/1"


def test_sbom_is_cyclonedx(validated):
    """Valid by the standard's own schema."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (validated / SBOM).read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    names = {one["name"].lower() for one in json.loads(text)["components"]}
    assert {"pydantic", "click", "cxx"} <= names
