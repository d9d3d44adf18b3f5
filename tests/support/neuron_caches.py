"""A fake of the compile cache of vLLM's newer Neuron plugin, and the server that filled it.

The layout is that of the plugin's sources of 0.21 (compile/{cache,schema,backend,parallel_compile}.py and
nki/nki_cache.py); the contents of graphs and NEFFs mean nothing, since nothing opens them.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.artifact.manifest import MANIFEST, FileEntry, dump, read
from pipeline.files.atomic import digest_file
from pipeline.nxdi.vllm_cache import CACHE_FOLDER, ServerRun
from pipeline.nxdi.vllm_cache_layout import COMPLETE, HLO, METADATA

KEYS = ("0" * 31 + "a", "0" * 31 + "b")
VERSIONS = {"vllm": "0.21.0", "vllm-neuron": "0.21.0.1.0.0", "neuronx-cc": "2.26.6360.0", "nki": "0.5.0"}
SERVE = ("some/model", "--tensor-parallel-size", "8", "--additional-config", '{"a": "b c"}')
RUN = ServerRun(SERVE, {"NEURON_LOGICAL_NC_CONFIG": "2"}, VERSIONS)
HOST = {"device": "neuron", "chip": "trn2"}


def fake_entry(
    cache: Path, key: str, *, target: str = "trn2", flags: str = "-O1 --lnc=2", inside: str = "", graph: str = HLO
) -> Path:
    """What the plugin leaves of one graph when it is done."""
    entry, neff = cache / key, f"NEFF of {key}".encode()
    entry.mkdir(parents=True)
    (entry / graph).write_bytes(f"HLO of {key}".encode())
    (entry / f"graph_{key}.neff").write_bytes(neff)
    told = {"version": 0, "created_timestamp": "2026-08-01T00:00:00+00:00", "cache_key": inside or key}
    (entry / METADATA).write_text(json.dumps({**told, "output_count": 1, "io_map": {"1": 0}}))
    command = (
        f"/opt/bin/neuronx-cc compile /x/{key}/{graph} --framework XLA --target {target} --output /x/n --logfile /x/l"
    )
    (entry / "command.txt").write_text(f"{command} {flags}")
    (entry / COMPLETE).write_text(f"completed:1785542400.0\nneff_size:{len(neff)}\n")
    return entry


def fake_cache(root: Path, graph: str = HLO) -> Path:
    """A VLLM_CACHE_ROOT with two graphs, a kernel, and what a server leaves beside them."""
    cache = root / CACHE_FOLDER
    for key in KEYS:
        fake_entry(cache, key, graph=graph)
    (cache / KEYS[0] / ".cache_accessed").write_text("1785542400")
    (cache / KEYS[0] / "dev0_7.rank3").mkdir()
    (cache / KEYS[0] / "dev0_7.rank3" / HLO).write_text("of a rank")
    (cache / f".{KEYS[0]}.compilation_metadata").write_text("pid:1\n")
    (cache / f".{KEYS[0]}.compilation_metadata.lock").write_text("")
    (cache / "nki").mkdir()
    (cache / "nki" / "k1.json").write_text('{"schema_version": 1}')
    (cache / "nki" / f"{KEYS[1]}.lock").write_text("")
    (root / "torch_compile_cache").mkdir()
    (root / "torch_compile_cache" / "other").write_text("vLLM's own")
    return root


def resealed(root: Path, **update) -> Path:
    """An artifact with another manifest and the digest of that manifest, as an attacker writes them."""
    manifest = read(root).manifest
    paths = [one for one in root.rglob("*") if one.is_file() and one.name != MANIFEST]
    digests = {one.relative_to(root).as_posix(): digest_file(one) for one in paths}
    files = {name: FileEntry(sha256=one.sha256, size=one.size) for name, one in digests.items()}
    (root / MANIFEST).write_bytes(dump(manifest.model_copy(update={"files": files, **update})))
    return root
