"""The graphs that a server looks up: listed in the manifest of a packed cache, and checked before the server starts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.artifact.manifest import MANIFEST, read
from pipeline.cli.main import main
from pipeline.errors import ArtifactError, InputError
from pipeline.nxdi.vllm_cache import CACHE_FOLDER, install, pack
from pipeline.nxdi.vllm_cache_keys import check, read_keys
from pipeline.nxdi.vllm_cache_layout import COMPLETE, HLO, METADATA, STABLEHLO
from support import small_artifacts as small
from support.neuron_caches import HOST, KEYS, RUN, VERSIONS, fake_cache, fake_entry, resealed

ABSENT = "f" * 32


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return fake_cache(tmp_path / "cache-root")


@pytest.fixture
def packed(cache: Path, tmp_path: Path) -> Path:
    pack(cache, tmp_path / "packed", "tiny-cache", RUN)
    return tmp_path / "packed"


@pytest.fixture
def installed(packed: Path, tmp_path: Path) -> Path:
    """The root of a cache that is complete."""
    install(packed, tmp_path / "root", host=HOST, versions=VERSIONS)
    return tmp_path / "root"


def checked(packed: Path, root: Path, host=HOST, versions=VERSIONS):
    return check(packed, root, host=host, versions=versions)


def test_manifest_lists_the_graphs_that_the_server_looked_up(packed):
    facts = read(packed).manifest.backend
    assert facts.expects == KEYS
    assert (facts.keys, facts.route) == (2, "xla")


def test_complete_cache_passes_from_the_manifest_alone(packed, installed, tmp_path):
    """On the serving host the artifact's files are gone; the server has used its cache, which has other graphs too."""
    (tmp_path / "alone").mkdir()
    shutil.copy(packed / MANIFEST, tmp_path / "alone")
    (installed / CACHE_FOLDER / KEYS[0] / ".cache_accessed").write_text("now")
    fake_entry(installed / CACHE_FOLDER, ABSENT)
    done = checked(tmp_path / "alone", installed, versions={"vllm": VERSIONS["vllm"]})
    assert (done.graphs, done.cache_root) == (2, str(installed))
    assert {*done.unchecked} == VERSIONS.keys() - {"vllm"}


def damage(installed: Path, name: str) -> str:
    """Spoil a cache; return what is said of it."""
    entry = installed / CACHE_FOLDER / KEYS[1]
    if name == "missing graph":
        shutil.rmtree(entry)
        return f"the cache lacks 1 of 2 graphs: {KEYS[1]}"
    if name == "empty cache":
        shutil.rmtree(installed)
        return f"the cache lacks 2 of 2 graphs: {KEYS[0]}, {KEYS[1]}; nki/k1.json: missing"
    if name == "unfinished":
        (entry / COMPLETE).unlink()
        return f"{KEYS[1]}: no {COMPLETE}"
    if name == "truncated":
        (entry / f"graph_{KEYS[1]}.neff").write_bytes(b"cut")
        return f"{KEYS[1]}: graph_{KEYS[1]}.neff has 3 bytes, {COMPLETE} records 40"
    if name == "truncated graph":
        (entry / HLO).write_bytes(b"cut")
        return f"{KEYS[1]}/{HLO}: 3 bytes, expected 39"
    if name == "same size":
        (entry / f"graph_{KEYS[1]}.neff").write_bytes(b"x" * 40)
        return f"{KEYS[1]}/graph_{KEYS[1]}.neff: sha256 "
    if name == "other key":
        (entry / METADATA).write_text(json.dumps({"cache_key": ABSENT}))
        return f"{KEYS[1]}: {METADATA} has the key '{ABSENT}'"
    (installed / CACHE_FOLDER / "nki/k1.json").unlink()
    return "nki/k1.json: missing"


DAMAGES = (
    "missing graph", "empty cache", "unfinished", "truncated", "truncated graph", "same size", "other key", "kernel",
)  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_cache_that_a_server_cannot_start_from_is_refused(packed, installed, name):
    says = damage(installed, name)
    with pytest.raises(ArtifactError) as caught:
        checked(packed, installed)
    assert says in caught.value.what
    assert caught.value.where == str(installed / CACHE_FOLDER)
    assert f"tandem vllm-cache install {packed}" in caught.value.fix


def test_cache_of_another_sdk_or_chip_is_refused(packed, installed):
    with pytest.raises(ArtifactError, match=r"neuronx-cc: filled with 2\.26\.6360\.0, this host has 2\.28\.7631"):
        checked(packed, installed, versions={**VERSIONS, "neuronx-cc": "2.28.7631"})
    with pytest.raises(ArtifactError, match="needs trn2, this host has trn3"):
        checked(packed, installed, host={"device": "neuron", "chip": "trn3"})


def test_artifact_of_an_earlier_version_lists_no_keys(packed, installed):
    """Its files tell the graphs."""
    facts = read(packed).manifest.backend
    resealed(packed, backend=facts.model_copy(update={"expects": ()}))
    assert checked(packed, installed).graphs == 2
    shutil.rmtree(installed / CACHE_FOLDER / KEYS[0])
    with pytest.raises(ArtifactError, match="the cache lacks 1 of 2 graphs"):
        checked(packed, installed)


def test_artifact_of_another_kind_is_refused(installed, tmp_path):
    made = small.make(tmp_path / "out", tmp_path / "work").root
    with pytest.raises(InputError, match="not a compile cache"):
        checked(made, installed)


@pytest.mark.parametrize("name", ["else", "../../outside/of/it"])
def test_manifest_of_foreign_files_is_refused(packed, installed, name):
    """A hostile manifest names a file outside of the cache."""
    data = json.loads((packed / MANIFEST).read_bytes())
    data["files"][name] = {"sha256": "0" * 64, "size": 1}
    (packed / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(ArtifactError):
        checked(packed, installed)


def test_install_refuses_an_artifact_without_a_graph_of_its_list(packed, tmp_path):
    facts = read(packed).manifest.backend
    resealed(packed, backend=facts.model_copy(update={"expects": (*KEYS, ABSENT)}))
    with pytest.raises(ArtifactError, match=f"the artifact lacks 1 of 3 graphs: {ABSENT}"):
        install(packed, tmp_path / "root", host=HOST, versions=VERSIONS)
    resealed(packed, backend=facts.model_copy(update={"expects": KEYS[:1]}))
    with pytest.raises(ArtifactError, match=f"{KEYS[1]}: not a graph that the manifest lists"):
        install(packed, tmp_path / "root", host=HOST, versions=VERSIONS)
    assert not (tmp_path / "root").exists()


def test_pack_takes_the_expected_graphs_alone(cache, tmp_path):
    """A cache that servers share has graphs of others, one of them unfinished."""
    (cache / CACHE_FOLDER / KEYS[1] / COMPLETE).unlink()
    manifest = pack(cache, tmp_path / "out", "tiny-cache", replace(RUN, expects=KEYS[:1]))
    assert manifest.backend.expects == KEYS[:1]
    assert {name.split("/")[2] for name in manifest.files} == {KEYS[0], "nki"}


def test_pack_refuses_when_an_expected_graph_is_missing(cache, tmp_path):
    with pytest.raises(InputError, match=f"the cache lacks 1 of 2 graphs: {ABSENT}") as caught:
        pack(cache, tmp_path / "out", "tiny-cache", replace(RUN, expects=(KEYS[0], ABSENT)))
    assert "warm-up" in caught.value.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [(), (HLO,)])
def test_native_route_has_another_graph_file(tmp_path, more):
    cache = fake_cache(tmp_path / "native", STABLEHLO)
    for key in KEYS:
        for name in more:
            (cache / CACHE_FOLDER / key / name).write_text("HLO of the same graph")
    manifest = pack(cache, tmp_path / "out", "native-cache", RUN)
    assert manifest.backend.route == "native"
    assert f"{CACHE_FOLDER}/{KEYS[0]}/{STABLEHLO}" in manifest.files
    install(tmp_path / "out", tmp_path / "root", host=HOST, versions=VERSIONS)
    assert checked(tmp_path / "out", tmp_path / "root").graphs == 2


@pytest.mark.parametrize(("graph", "value"), [(HLO, "neuron_native"), (HLO, "neuron"), (STABLEHLO, "neuron_libtorch")])
def test_pack_refuses_a_route_that_the_server_did_not_use(tmp_path, graph, value):
    cache = fake_cache(tmp_path / "cache", graph)
    run = replace(RUN, environment={"VLLM_NEURON_BACKEND": value})
    with pytest.raises(InputError, match=f"VLLM_NEURON_BACKEND={value} contradicts the entries"):
        pack(cache, tmp_path / "out", "tiny-cache", run)


def test_pack_refuses_entries_of_two_routes(cache, tmp_path):
    fake_entry(cache / CACHE_FOLDER, ABSENT, graph=STABLEHLO)
    with pytest.raises(InputError, match="of 2 routes: native, xla") as caught:
        pack(cache, tmp_path / "out", "tiny-cache", RUN)
    assert "--expect" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no key in the file"),
        ("# only a comment\n", "no key in the file"),
        (f"{KEYS[0]}\nMODULE_1\n", "found 'MODULE_1', expected a key: 32 hexadecimal digits"),
        (KEYS[0][:-1], "expected a key"),
        (KEYS[0].upper().replace("0", "A"), "in lower case"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_file_of_keys_that_is_wrong(tmp_path, text, says):
    (tmp_path / "keys").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=says) as caught:
        read_keys(tmp_path / "keys")
    assert caught.value.fix


def test_file_of_keys(tmp_path):
    (tmp_path / "keys").write_text(f"# of a warm-up\n\n{KEYS[1]}\n  {KEYS[0]}\n{KEYS[1]}\n")
    assert read_keys(tmp_path / "keys") == KEYS
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "other")


def test_command_line(cache, tmp_path):
    """`check` ends with an error, so a unit or a container that runs it first does not start the server."""
    (tmp_path / "keys").write_text("\n".join(KEYS))
    versions = [word for name, one in VERSIONS.items() for word in ("--version-of", f"{name}={one}")]
    out, root = str(tmp_path / "out"), str(tmp_path / "root")
    words = ["vllm-cache", "pack", str(cache), "--name", "tiny-cache", "-o", out, "--serve", "m", *versions]
    said = CliRunner().invoke(main, [*words, "--expect", str(tmp_path / "keys")])
    assert said.exit_code == 0, said.stderr
    command = ["vllm-cache", "check", out, "--cache-root", root]
    said = CliRunner().invoke(main, command)
    assert said.exit_code != 0
    assert "lacks 2 of 2 graphs" in said.stderr
    assert CliRunner().invoke(main, ["vllm-cache", "install", out, "--cache-root", root]).exit_code == 0
    said = CliRunner().invoke(main, command)
    assert said.exit_code == 0, said.stderr
    assert "2 graphs, complete" in said.stdout
    said = CliRunner().invoke(main, [*command, "--json"])
    assert json.loads(said.stdout)["graphs"] == 2
