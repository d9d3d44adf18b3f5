"""Compile caches of vLLM's newer Neuron plugin: packed whole or not at all, published, pulled, installed, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.artifact.manifest import MANIFEST, CacheManifest, content_digest, read
from pipeline.artifact.verify import verify
from pipeline.cli.main import main
from pipeline.errors import ArtifactError, GateError, InputError
from pipeline.files.unfinished import TEMP
from pipeline.nxdi.vllm_cache import CACHE_FOLDER, NEVER_COMPILE, ServerRun, install, pack
from pipeline.nxdi.vllm_cache_layout import COMPLETE, HLO, METADATA
from pipeline.registry.card import body
from pipeline.registry.publish import PublishSettings, listed_places, publish
from pipeline.registry.pull import pull
from pipeline.registry.releases import list_releases
from pipeline.runtime.open import load
from support import small_artifacts as small
from support.neuron_caches import HOST, KEYS, RUN, SERVE, VERSIONS, fake_cache, fake_entry, resealed


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return fake_cache(tmp_path / "cache-root")


@pytest.fixture
def packed(cache: Path, tmp_path: Path) -> Path:
    pack(cache, tmp_path / "packed", "tiny-cache", RUN)
    return tmp_path / "packed"


def put(packed: Path, root: Path, host=HOST, versions=VERSIONS):
    return install(packed, root, host=host, versions=versions)


def test_pack_records_what_fills_a_cache_and_leaves_out_what_is_one_server_s(packed):
    manifest = verify(packed).manifest
    assert isinstance(manifest, CacheManifest)
    assert json.loads((packed / MANIFEST).read_bytes())["kind"] == "vllm-compile-cache"
    assert manifest.toolchain == {"backend": "vllm-compile-cache", **VERSIONS}
    assert manifest.requires == {"device": "neuron", "chip": "trn2"}
    assert manifest.ranks == 8
    assert manifest.backend.flags == ("-O1 --lnc=2",)
    assert manifest.backend.serve == SERVE
    names = (HLO, METADATA, COMPLETE, "command.txt")
    entries = {f"{CACHE_FOLDER}/{key}/{name}" for key in KEYS for name in (*names, f"graph_{key}.neff")}
    assert manifest.files.keys() == entries | {f"{CACHE_FOLDER}/nki/k1.json"}


def test_pack_takes_the_cache_folder_itself_and_gives_the_same(cache, packed, tmp_path):
    again = pack(cache / CACHE_FOLDER, tmp_path / "again", "tiny-cache", RUN)
    assert again.version == read(packed).manifest.version
    assert content_digest(again) == content_digest(read(packed).manifest)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (HLO, "no graph.hlo"),
        (COMPLETE, "no .compilation_complete"),
        (METADATA, "no .artifact_metadata_v0.json"),
        (f"graph_{KEYS[1]}.neff", "no graph_"),
    ],
)
def test_pack_refuses_an_entry_that_is_not_complete(cache, tmp_path, name, says):
    (cache / CACHE_FOLDER / KEYS[1] / name).unlink()
    with pytest.raises(InputError, match=f"{KEYS[1]}: {says}") as caught:
        pack(cache, tmp_path / "out", "tiny-cache", RUN)
    assert "warm-up" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_pack_refuses_a_neff_of_another_size_than_its_mark_says(cache, tmp_path):
    (cache / CACHE_FOLDER / KEYS[0] / f"graph_{KEYS[0]}.neff").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"has 3 bytes, \.compilation_complete records 40"):
        pack(cache, tmp_path / "out", "tiny-cache", RUN)


def test_pack_refuses_an_entry_that_was_renamed(cache, tmp_path):
    """The plugin ends with an error where the key inside is another than the folder's."""
    fake_entry(cache / CACHE_FOLDER, "c" * 32, inside="d" * 32)
    with pytest.raises(InputError, match=f"has the key '{'d' * 32}'"):
        pack(cache, tmp_path / "out", "tiny-cache", RUN)


@pytest.mark.parametrize("name", ["rank_0/neff", f"ab/cd/{'ab' * 16}.neff"])
def test_pack_refuses_another_layout(tmp_path, name):
    """Only layouts of public sources are taken, and not that of TorchNeuron's own store of NEFFs."""
    (tmp_path / "cache" / name).mkdir(parents=True)
    with pytest.raises(InputError, match=rf"{name[:2]}.*: neither an entry nor kernels.*no entry"):
        pack(tmp_path / "cache", tmp_path / "out", "tiny-cache", RUN)


def test_pack_refuses_a_link(cache, tmp_path):
    (cache / CACHE_FOLDER / KEYS[0] / "more").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="more: a link"):
        pack(cache, tmp_path / "out", "tiny-cache", RUN)


def test_pack_refuses_entries_for_two_chips(cache, tmp_path):
    fake_entry(cache / CACHE_FOLDER, "c" * 32, target="trn3")
    with pytest.raises(InputError, match="for trn2, trn3"):
        pack(cache, tmp_path / "out", "tiny-cache", RUN)


def test_pack_without_versions_names_the_option(cache, tmp_path):
    with pytest.raises(InputError) as caught:
        pack(cache, tmp_path / "out", "tiny-cache", ServerRun(SERVE, {}, {"nki": "0.5.0"}))
    assert "--version-of neuronx-cc=VERSION" in caught.value.fix


@pytest.mark.parametrize("name", ["VLLM_CACHE_ROOT", "VLLM_NEURON_DISABLE_COMPILE_CACHE", "A B"])
def test_pack_refuses_variables_that_contradict(cache, tmp_path, name):
    with pytest.raises(InputError, match=name):
        pack(cache, tmp_path / "out", "tiny-cache", ServerRun(SERVE, {name: "1"}, VERSIONS))


def test_publish_pull_install(packed, tmp_path):
    """From one host's cache to another's: the same bytes under the same names, and nothing links to the artifact."""
    registry = str(tmp_path / "registry")
    with pytest.raises(GateError, match="has no validation gates: it was compiled by vLLM's Neuron plugin"):
        publish(packed, registry)
    release = publish(packed, registry, ["prod"], PublishSettings(unvalidated=True))
    assert publish(packed, registry, options=PublishSettings(unvalidated=True)).sent == 0
    assert [one.version for one in list_releases(registry)] == [release.version]
    pulled = pull(f"{registry}/tiny-cache@prod", tmp_path / "pulled", cache=tmp_path / "blobs")
    done = put(pulled, tmp_path / "root")
    assert (done.added, done.kept, done.unchecked) == (2, 0, ())
    there = small.digests(tmp_path / "root")
    assert there == {name: entry.sha256 for name, entry in read(pulled).manifest.files.items()}
    assert all((tmp_path / "root" / name).stat().st_nlink == 1 for name in there)
    assert not list((tmp_path / "root").rglob(f"{TEMP}*"))


def test_install_says_what_a_server_needs(packed, tmp_path):
    done = put(packed, tmp_path / "root")
    root = str(tmp_path / "root")
    assert done.environment == {"NEURON_LOGICAL_NC_CONFIG": "2", "VLLM_CACHE_ROOT": root, **NEVER_COMPILE}
    assert NEVER_COMPILE["VLLM_NEURON_DISABLE_WARMUP_COMPILE"] == "1"
    assert done.shell().endswith(
        """vllm serve some/model --tensor-parallel-size 8 --additional-config '{"a": "b c"}'"""
    )


def test_install_again_keeps_what_a_server_used(packed, tmp_path):
    put(packed, tmp_path / "root")
    (tmp_path / "root" / CACHE_FOLDER / KEYS[0] / ".cache_accessed").write_text("now")
    done = put(packed, tmp_path / "root")
    assert (done.added, done.kept) == (0, 2)


def test_install_brings_what_is_missing_beside_others(packed, tmp_path):
    put(packed, tmp_path / "root")
    place = tmp_path / "root" / CACHE_FOLDER
    shutil.rmtree(place / KEYS[1])
    (place / "nki/k1.json").unlink()
    fake_entry(place, "e" * 32)
    done = put(packed, tmp_path / "root")
    assert (done.added, done.kept) == (1, 1)
    assert (place / "nki/k1.json").is_file()
    assert (place / ("e" * 32) / COMPLETE).is_file()


@pytest.mark.parametrize("name", [f"{KEYS[0]}/{HLO}", "nki/k1.json"])
def test_install_never_replaces_another_content(packed, tmp_path, name):
    place = tmp_path / "root" / CACHE_FOLDER
    (place / name).parent.mkdir(parents=True)
    (place / name).write_text("somebody else's")
    before = small.digests(tmp_path / "root")
    with pytest.raises(ArtifactError, match="not overwritten") as caught:
        put(packed, tmp_path / "root")
    assert "--cache-root" in caught.value.fix
    assert small.digests(tmp_path / "root") == before


def test_install_refuses_other_versions(packed, tmp_path):
    with pytest.raises(ArtifactError, match=r"neuronx-cc: filled with 2\.26\.6360\.0, this host has 2\.27"):
        put(packed, tmp_path / "root", versions={**VERSIONS, "neuronx-cc": "2.27"})
    assert not (tmp_path / "root").exists()


def test_install_refuses_another_chip(packed, tmp_path):
    with pytest.raises(ArtifactError, match="needs trn2, this host has trn3"):
        put(packed, tmp_path / "root", host={"device": "neuron", "chip": "trn3"})


def test_install_where_nothing_is_known_says_so(packed, tmp_path):
    done = put(packed, tmp_path / "root", host={"device": "cpu"}, versions={})
    assert set(done.unchecked) == VERSIONS.keys()


def test_install_refuses_a_damaged_artifact(packed, tmp_path):
    (packed / CACHE_FOLDER / KEYS[0] / HLO).write_text("changed")
    with pytest.raises(ArtifactError, match=HLO):
        put(packed, tmp_path / "root")


def test_install_refuses_an_incomplete_one_whatever_its_manifest_says(packed, tmp_path):
    (packed / CACHE_FOLDER / KEYS[0] / COMPLETE).unlink()
    with pytest.raises(ArtifactError, match=r"no \.compilation_complete"):
        put(resealed(packed), tmp_path / "root")
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    "name", ["torch_compile_cache/x", f"neuron/compile_cache/.{KEYS[0]}.compilation_metadata", "neuron/other"]
)
def test_install_takes_nothing_but_a_cache(packed, tmp_path, name):
    """A lock that came along would make the plugin throw its entry away."""
    (packed / name).parent.mkdir(exist_ok=True, parents=True)
    (packed / name).write_text("pid:1\n")
    with pytest.raises(ArtifactError, match="not a file of a compile cache"):
        put(resealed(packed), tmp_path / "root")


def test_install_refuses_a_variable_that_is_a_command(packed, tmp_path):
    manifest = read(packed).manifest
    assert isinstance(manifest, CacheManifest)
    backend = manifest.backend.model_copy(update={"environment": {"A=1; touch x; B": "1"}})
    with pytest.raises(ArtifactError, match="invalid name of a variable"):
        put(resealed(packed, backend=backend), tmp_path / "root")


def test_install_refuses_an_artifact_of_another_kind(tmp_path):
    made = small.make(tmp_path / "out", tmp_path / "work").root
    with pytest.raises(InputError, match="not a compile cache"):
        put(made, tmp_path / "root")


def test_other_commands_know_the_kind(packed):
    manifest = read(packed).manifest
    card = body(manifest, {"": manifest})
    assert "vllm serve some/model" in card
    assert "2, of the xla route" in card
    assert listed_places([packed]) == []
    with pytest.raises(InputError, match="a compile cache"):
        load(packed)
    for words in (["inspect", str(packed)], ["verify", str(packed)]):
        assert CliRunner().invoke(main, words).exit_code == 0
    said = CliRunner().invoke(main, ["vllm-args", str(packed)])
    assert said.exit_code == 2
    assert "tandem vllm-cache install" in said.stderr


def test_command_line(cache, tmp_path):
    versions = [word for name, one in VERSIONS.items() for word in ("--version-of", f"{name}={one}")]
    out, root = str(tmp_path / "out"), str(tmp_path / "root")
    words = ["vllm-cache", "pack", str(cache), "--name", "tiny-cache", "-o", out, "--serve", "m -tp 4", *versions]
    said = CliRunner().invoke(main, words)
    assert said.exit_code == 0, said.stderr
    assert "2 graphs" in said.stdout
    assert read(tmp_path / "out").manifest.ranks == 4
    said = CliRunner().invoke(main, ["vllm-cache", "install", out, "--cache-root", root])
    assert said.exit_code == 0, said.stderr
    assert said.stdout.startswith(f"VLLM_CACHE_ROOT={root} VLLM_NEURON_DISABLE_WARMUP_COMPILE=1 ")
    assert said.stdout.endswith("vllm serve m -tp 4\n")
    assert "not compared, because not installed" in said.stderr
