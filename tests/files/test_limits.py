"""Documents of strangers: what they may cost before anything about them is known."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

from pipeline.artifact.manifest import MAX_FILES, parse
from pipeline.errors import CorruptError
from pipeline.files.limits import MAX_BYTES, MAX_VALUES, json_object
from support.paths import ROOT


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"a": ' + b"[" * 100_000, "not JSON"),
        (b"[" + b"{}," * MAX_VALUES + b"{}]", f"values, limit {MAX_VALUES:,}"),
        (b" " * (MAX_BYTES + 1), f"bytes, limit {MAX_BYTES:,}"),
        (b"[1]", "not a JSON object"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
    ],
)
def test_json_object_refuses(data, says):
    with pytest.raises(CorruptError, match=says):
        json_object(data, "m")


def test_a_manifest_of_the_most_files_is_within_the_limits():
    """The limits fit each other: a manifest that the packager may write is read."""
    files = {f"weights/target/rank-{number}-of-50000.safetensors": {"sha256": "0" * 64, "size": 1 << 40}
             for number in range(MAX_FILES)}  # fmt: skip
    data = json.dumps({"schema_version": 3, "files": files}, indent=1).encode()
    assert len(json_object(data, "m")["files"]) == MAX_FILES
    assert len(data) < MAX_BYTES


HOSTILE = {
    "deep path": '{"schema_version": 3, "kind": "pair", "files": {"' + "a/" * 30_000 + 'b": {}}}',
    "empty lists": '{"schema_version": 3, "kind": "pair", "files": {}, "graphs": [' + "[]," * 240_000 + "[]]}",
    "wrong files": '{"schema_version": 3, "kind": "pair", "files": {'
    + ",".join(f'"f{number}": {{"x": 1}}' for number in range(49_000)) + "}}",
    "unknown keys": '{"schema_version": 3, "kind": "pair", ' + ",".join(f'"k{n}": 1' for n in range(240_000)) + "}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_costs_little(name, tmp_path):
    """66 kB with one deep path took 385 MiB, before any signature was checked."""
    (tmp_path / "m").write_text(HOSTILE[name])
    code = """
    import resource, sys, time
    from pipeline.artifact.manifest import parse
    from pipeline.errors import CorruptError
    data = open(sys.argv[1], "rb").read()
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        parse(data, "m")
    except CorruptError as error:
        print(len(str(error)) < 1000)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, time.process_time() - started)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    short, mib, seconds = done.stdout.split()
    assert short == "True"
    assert int(mib) < 250, f"{mib} MiB"
    assert float(seconds) < 10


def test_parse_counts_files_before_it_makes_records():
    entry = {"sha256": "0" * 64, "size": 1}
    data = json.dumps({"schema_version": 3, "files": {f"f{n}": entry for n in range(MAX_FILES + 1)}}).encode()
    with pytest.raises(CorruptError, match=f"files, limit {MAX_FILES:,}"):
        parse(data, "m")
