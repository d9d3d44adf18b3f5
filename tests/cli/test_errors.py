"""Exit codes by kind, errors as JSON, times in logs: what a script and a person on call rely on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import click
import pytest

from pipeline.cli import registry
from pipeline.cli.main import main
from pipeline.errors import HostError
from pipeline.registry.publish import publish
from support import small_artifacts as small
from support.commands import answer, invoke
from support.signing_keys import key_pair

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a registry `reg`, an artifact `out`, and a public key that signed nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    made = small.make_validated(tmp_path / "out", tmp_path / "work").root
    publish(made, str(tmp_path / "reg"), ["prod"])
    key_pair(tmp_path, "key")
    return tmp_path


def damage(folder: Path) -> None:
    blob = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[0] ^= 1
    blob.write_bytes(data)


CASES = {
    "a misspelt name": (("pull", "reg/smal@prod", "d"), 2, "input"),
    "a wrong option": (("pull", "--nope"), 2, "input"),
    "a wrong option before the command": (("--nope", "pull"), 2, "input"),
    "unsigned": (("pull", "reg/small@prod", "d", "--require-signature", "key.pub"), 4, "refused"),
    "unsigned on disk": (("verify", "out", "--require-signature", "key.pub"), 4, "refused"),
    "unsigned to serve": (("serve", "out", "--require-signature", "key.pub"), 4, "refused"),
    "never pulled": (("pull", "reg/small@prod", "d", "--offline"), 3, "environment"),
    "no such artifact": (("inspect", "nothing"), 2, "input"),
    "an unsupported store": (("ls", "gs://bucket"), 3, "environment"),
}


@pytest.mark.parametrize("name", CASES)
def test_errors_have_a_code_and_an_object(place, name):
    """All of these ended with code 2, and `--json` printed nothing on stdout."""
    words, code, kind = CASES[name]
    result = invoke(*words, "--json")
    assert result.exit_code == code, result.output
    error = json.loads(result.stdout)["error"]
    assert (error["kind"], error["exit_code"]) == (kind, code)
    assert error["problems"]
    assert all(problem["what"] for problem in error["problems"])
    assert error["problems"][0]["what"] in result.stderr
    assert invoke(*words).stdout == ""


def test_wrong_bytes_are_corrupt(place):
    damage(place / "reg/blobs")
    damage(place / "out/weights")
    for words in (("pull", "reg/small@prod", "d"), ("verify", "out")):
        result = invoke(*words, "--json")
        assert result.exit_code == 5, result.output
        assert json.loads(result.stdout)["error"]["kind"] == "corrupt"
        assert result.stderr.startswith("corrupt: ")


def test_an_unvalidated_artifact_is_a_gate(place):
    small.make(place / "raw", place / "work")
    result = invoke("publish", "raw", "--to", "reg", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["kind"] == "gate"


def test_publish_prints_one_document_for_all_places(place):
    """An object of an error behind the list would be no JSON any more."""
    (place / "file").touch()
    result = invoke("publish", "out", "--to", "reg", "--to", "file/reg", "--json")
    assert result.exit_code != 0
    first, second = json.loads(result.stdout)
    assert first["name"] == "small"
    assert second["error"]["exit_code"] == result.exit_code
    assert second["error"]["problems"][0]["what"] in result.stderr


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command with a bug."""

    @click.command("ls")
    @click.option("--json", is_flag=True, expose_value=False)
    def fails() -> None:
        raise ZeroDivisionError("bug")

    monkeypatch.setitem(main.commands, "ls", fails)


def test_a_bug_is_no_failed_gate(broken):
    """An unexpected exception ended with code 1, as a failed gate."""
    result = invoke("ls", "--json")
    assert result.exit_code == 70
    assert json.loads(result.stdout)["error"]["kind"] == "bug"
    assert "ZeroDivisionError: bug" in result.stderr
    assert "a bug in Tandem" in result.stderr


def test_logs_have_times_without_a_terminal(place, monkeypatch):
    monkeypatch.delenv("TANDEM_TIMESTAMPS")
    result = answer("pull", "reg/small@prod", "d")
    assert re.fullmatch(rf"{TIME} pulled small@.*\n", result.stderr)
    assert result.stdout == "d\n"
    refused = invoke("inspect", "nothing")
    assert re.match(rf"{TIME} wrong input: ", refused.stderr)
    monkeypatch.setenv("TANDEM_TIMESTAMPS", "0")
    assert invoke("inspect", "nothing").stderr.startswith("wrong input: ")


METRIC = re.compile(r'(tandem_\w+)\{((?:\w+="(?:[^"\\]|\\.)*",?)*)\} (-?[\d.]+(?:e[+-]?\d+)?)')


def metrics(path: Path) -> dict[str, tuple[dict[str, str], float]]:
    """Read Prometheus' text format: each sample has a type, and ends a line."""
    lines = path.read_text().splitlines()
    samples = [METRIC.fullmatch(line) for line in lines if not line.startswith("#")]
    assert all(samples), lines
    types = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert types == {sample[1] for sample in samples}
    return {s[1]: (dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', s[2])), float(s[3])) for s in samples}


def test_pull_writes_metrics(place):
    shown = json.loads(answer("pull", "reg/small@prod", "d", "--metrics", "tandem.prom", "--json").stdout)
    found = metrics(place / "tandem.prom")
    labels, _ = found["tandem_pull_info"]
    assert labels == {key: shown[key] for key in ("name", "version", "digest")} | {"reference": "reg/small@prod"}
    assert found["tandem_pull_bytes"][1] == shown["size_bytes"]
    assert 0 <= found["tandem_release_age_seconds"][1] < 600
    assert found["tandem_pull_seconds"][1] >= 0
    assert found["tandem_pull_success"][1] == 1


def test_a_failed_pull_writes_its_code(place):
    assert invoke("pull", "reg/small@prod", "d", "--require-signature", "key.pub",
                  "--metrics", "tandem.prom").exit_code == 4  # fmt: skip
    found = metrics(place / "tandem.prom")
    assert (found["tandem_pull_success"][1], found["tandem_pull_exit_code"][1]) == (0, 4)
    assert "tandem_pull_info" not in found


def test_metrics_escape_labels(place):
    assert invoke("pull", 'reg/"x\\y@prod', "d", "--metrics", "tandem.prom").exit_code == 2
    assert metrics(place / "tandem.prom")["tandem_pull_success"][0]["reference"] == 'reg/\\"x\\\\y@prod'


def test_retry_repeats_what_may_pass(place, monkeypatch):
    """The systemd unit failed for good with the first failure of the network."""
    pauses: list[float] = []
    shutil.move(place / "reg", place / "away")
    real = registry.pull_release

    def away(*args: object, **options: object) -> object:
        if len(pauses) < 3:
            raise HostError("the server is unreachable", where="reg")
        if (place / "away").exists():
            shutil.move(place / "away", place / "reg")
        return real(*args, **options)

    monkeypatch.setattr(registry, "pull_release", away)
    monkeypatch.setattr(registry.time, "sleep", pauses.append)
    result = answer("pull", "reg/small@prod", "d", "--retry", "3600")
    assert pauses == [2.0, 4.0, 8.0]
    assert result.stderr.count("unreachable; next attempt in") == 3


@pytest.mark.parametrize("extra", [("--require-signature", "key.pub"), ("--variant", "none")])
def test_retry_does_not_repeat_what_fails_again(place, monkeypatch, extra):
    monkeypatch.setattr(registry.time, "sleep", lambda _: pytest.fail("repeated"))
    assert invoke("pull", "reg/small@prod", "d", "--retry", "3600", *extra).exit_code in (2, 4)


def test_retry_ends(place, monkeypatch):
    def away(*_: object, **__: object) -> None:
        raise HostError("away")

    monkeypatch.setattr(registry, "pull_release", away)
    monkeypatch.setattr(registry.time, "sleep", lambda _: None)
    assert invoke("pull", "reg/small@prod", "d", "--retry", "0.05").exit_code == 3
