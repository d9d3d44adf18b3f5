"""A session on a terminal of 80 and of 140 columns, as golden text: what a reader sees of each command.

Digests, times and paths are masked. After a wanted change: TANDEM_WRITE_GOLDEN=1 pytest tests/cli/test_session.py
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from support import small_artifacts as small
from support.paths import TESTS
from support.signing_keys import key_pair

SESSION = [
    "inspect out", "verify out", "publish out --to r --version 1.0 --alias prod --sign key.pem", "ls r",
    "pull r/small@prod p --require-signature key.pub", "verify p --require-signature key.pub", "verify p",
    "inspect bad", "diff out bad", "alias list r/small", "alias history r/small@prod", "gc r",
    "cache stats", "inspect nothing", "inspect r",
]  # fmt: skip
CODE = """
import sys
from pipeline.cli.main import main
for line in sys.stdin.read().splitlines():
    print(f"$ tandem {line}", flush=True)
    try:
        main(line.split())
    except SystemExit as end:
        if end.code:
            print(f"(exit code {end.code})", flush=True)
"""
MASKS = {
    r"[^\n]*\x1b\[2K": "",  # a bar, and what takes it away
    r"\x1b\[[0-9;?]*[A-Za-z]": "",
    r"\r": "",
    r"[0-9a-f]{64}": "F" * 64,
    r"\b[0-9a-f]{12}\b": "D" * 12,
    r"\d{4}-\d\d-\d\d": "YYYY-MM-DD",
    r"\d\d:\d\d(:\d\d)?": "hh:mm",
    r"\d\d\.\d KiB": "NN.N KiB",  # the provenance of a build differs in length
}


def shown(work: Path, columns: int) -> str:
    """Everything that a terminal received of the session, control codes taken out."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 400, columns, 0, 0))
    gone = {"NO_COLOR", "COLUMNS", "TANDEM_POLICY"}
    environment = {name: value for name, value in os.environ.items() if name not in gone}
    environment |= {"TERM": "xterm", "TANDEM_CACHE": "cache", "USER": "somebody"}
    child = subprocess.Popen(
        [sys.executable, "-c", CODE], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, cwd=work, env=environment
    )
    assert child.stdin is not None
    child.stdin.write("\n".join(SESSION).encode())
    child.stdin.close()
    os.close(theirs)
    text = b""
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # the terminal is closed
            break
        if not piece:
            break
        text += piece
    os.close(ours)
    assert child.wait() == 0
    return text.decode()


def masked(text: str) -> str:
    for pattern, instead in MASKS.items():
        text = re.sub(pattern, instead, text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1767225600")  # equal provenance in both artifacts
    small.make_validated(tmp_path / "out", tmp_path / "work")
    small.make_validated(tmp_path / "bad", tmp_path / "work", passed=False, graph=b"other")
    manifest = tmp_path / "bad" / "manifest.json"
    manifest.write_text(re.sub(r'"created": ?"[^"]*"', '"created":"2026-01-02T03:04:05Z"', manifest.read_text()))
    key_pair(tmp_path, "key")
    return tmp_path


@pytest.mark.parametrize("columns", [80, 140])
def test_session_on_a_terminal(work: Path, columns: int):
    golden = TESTS / "cli" / f"session-{columns}.txt"
    text = masked(shown(work, columns)).replace(str(work), "WORK")
    if os.environ.get("TANDEM_WRITE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
