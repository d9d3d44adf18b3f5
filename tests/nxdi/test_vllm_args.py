"""What starts AWS's classic plugin on an artifact of NxD Inference, wherever it lies; what is said of other kinds."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.artifact.manifest import MANIFEST, Artifact, FileEntry, NxdiBackend, NxdiManifest, PairArtifact, dump
from pipeline.cli.main import main
from pipeline.errors import ArtifactError, InputError
from pipeline.files.atomic import digest_file
from pipeline.nxdi.config import _vllm
from pipeline.nxdi.vllm_args import SETTINGS, classic
from pipeline.plan.plan import make_plan
from pipeline.recipe.schema import Recipe
from support import small_artifacts as small


@pytest.fixture
def nxdi(tmp_path: Path) -> Path:
    """A small artifact, sealed as one of NxD Inference; what vllm is told comes from the real planner."""
    return told(small.make(tmp_path / "a b" / "out", tmp_path / "work")).root


def told(made: PairArtifact, **environment: str) -> Artifact:
    recipe = Recipe.model_validate_json(json.dumps(small.RECIPE), strict=False)
    asked = {"vllm": _vllm(make_plan(recipe, small.CONFIG, small.CONFIG), recipe.speculation.draft_tokens[0])}
    asked["vllm"]["environment"] |= environment
    (made.root / SETTINGS).write_text(json.dumps(asked))
    digest = digest_file(made.root / SETTINGS)
    files = {**made.manifest.files, SETTINGS: FileEntry(sha256=digest.sha256, size=digest.size)}
    old = made.manifest
    manifest = NxdiManifest(
        name=old.name, version=old.version, created=old.created, toolchain={**old.toolchain, "backend": "nxdi"},
        requires=old.requires, files=files, recipe_digest=old.recipe_digest, lock_digest=old.lock_digest,
        backend=NxdiBackend(target="trn2", lnc=1, flags={}), pair=old.pair, draft_tokens=old.draft_tokens[0],
    )  # fmt: skip
    (made.root / MANIFEST).write_bytes(dump(manifest))
    return Artifact(made.root, manifest)


def test_classic_resolves_every_path(nxdi):
    found = classic(nxdi)
    assert found.directory == str(nxdi)
    assert found.environment == {
        "NEURON_COMPILED_ARTIFACTS": str(nxdi), "VLLM_NEURON_FRAMEWORK": "neuronx-distributed-inference"
    }  # fmt: skip
    assert found.command[:3] == ("vllm", "serve", f"{nxdi}/models/target")
    options = dict(zip(found.command[3::2], found.command[4::2], strict=True))
    assert options["--tensor-parallel-size"] == "1"
    assert options["--max-model-len"] == "29"
    assert json.loads(options["--speculative-config"]) == {
        "model": f"{nxdi}/models/draft", "num_speculative_tokens": 3
    }  # fmt: skip
    assert (found.draft_tokens, found.num_speculative_tokens) == (2, 3)


def test_vllm_args_is_a_line_that_a_shell_takes(nxdi, tmp_path):
    """A stand-in for vllm on the PATH tells what it was given, out of a folder with a space in its name."""
    fake = tmp_path / "bin" / "vllm"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\npwd\necho "$NEURON_COMPILED_ARTIFACTS"\nfor one in "$@"; do echo "$one"; done\n')
    fake.chmod(0o755)
    said = CliRunner().invoke(main, ["vllm-args", str(nxdi)])
    assert said.exit_code == 0, said.output
    assert "K = 2" in said.stdout
    where = {"PATH": f"{fake.parent}:/usr/bin:/bin"}
    done = subprocess.run(["sh", "-c", said.stdout], env=where, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(nxdi), str(nxdi), *classic(nxdi).command[1:]]


def test_vllm_args_json(nxdi):
    said = CliRunner().invoke(main, ["vllm-args", str(nxdi), "--json"])
    assert tuple(json.loads(said.stdout)["command"]) == classic(nxdi).command


def test_classic_refuses_what_does_not_verify(nxdi):
    (nxdi / SETTINGS).write_text("{}")
    with pytest.raises(ArtifactError, match=SETTINGS):
        classic(nxdi)


def test_classic_refuses_a_variable_that_is_a_command(tmp_path):
    root = told(small.make(tmp_path / "out", tmp_path / "work"), **{"A=1; rm -rf x; B": "1"}).root
    with pytest.raises(ArtifactError, match="invalid name of an environment variable"):
        classic(root)


def test_classic_quotes_values(tmp_path):
    root = told(small.make(tmp_path / "out", tmp_path / "work"), WORDS="$(touch x); 'y'").root
    assert "WORDS=" + shlex.quote("$(touch x); 'y'") in classic(root).shell()


def test_classic_of_another_backend_says_what_serves_it(tmp_path):
    root = small.make(tmp_path / "out", tmp_path / "work").root
    with pytest.raises(InputError) as caught:
        classic(root)
    assert f"tandem serve {root}" in caught.value.fix
