"""Messages on stderr: stages, bars and colour, on a terminal and without one."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import termios

import pytest

from pipeline.cli import console as module
from pipeline.cli.console import MIB, Console, coloured


def on_terminal(code: str, **env: str) -> str:
    """Run code with stdout and stderr on one terminal; returns everything that it received."""
    ours, theirs = os.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    subprocess.run(
        [sys.executable, "-c", code], stdout=theirs, stderr=theirs, check=True,
        env=environment | {"TERM": "xterm", "COLUMNS": "100"} | env,
    )  # fmt: skip
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    return shown


def test_progress_without_a_terminal_shows_nothing(capfd):
    """Plain lines stay: stages, warnings. With -q, there is nothing but the result."""
    console = Console()
    for done in range(3):
        console.progress("shard", done, 2)
    console.transfer("pull")(MIB, 2 * MIB)
    console.log("package (0.1 s)")
    console.close()
    Console(quiet=True).log("nothing")
    captured = capfd.readouterr()
    assert captured.err == "package (0.1 s)\n"
    assert captured.out == ""


BARS = (
    "import time\nfrom pipeline.cli.console import Console\nc = Console()\nc.progress('shard', 1, 2)\n"
    "time.sleep(0.5)\nc.log('package [x]')\nc.progress('shard', 2, 2)\nprint('the result')\n"
)


def test_progress_on_a_terminal_is_a_bar_that_vanishes_when_the_work_ends():
    """`pull` printed `100% 0:00:00ttye`: its result was written into the line of a bar that had not ended."""
    shown = on_terminal(BARS)
    assert "shard" in shown
    assert "50%" in shown
    assert "package [x]\r\n" in shown
    after = shown.rpartition("the result")[0]
    assert "\x1b[2K" in after[after.rindex("shard") :], "the bar was not taken away before the result"


@pytest.mark.parametrize("env", [{"TERM": "dumb"}])
def test_progress_on_a_terminal_without_a_cursor_shows_nothing(env):
    assert on_terminal(BARS, **env) == "package [x]\r\nthe result\r\n"


HASHING = (
    "import time\nfrom pathlib import Path\nfrom pipeline.cli.console import Console\n"
    "from pipeline.sources.checkpoint import digest_files\nc = Console()\n"
    "[Path(n).write_bytes(b'x') for n in 'ab']\ndigest_files(Path('.'), ['a', 'b'], None, c.progress)\n"
    "assert not c._tasks, c._tasks\n"
)


def test_hashing_leaves_no_bar(tmp_path, monkeypatch):
    """Every hashed file left a bar at `0%`."""
    monkeypatch.chdir(tmp_path)
    on_terminal(HASHING)


def test_transfer_tells_bytes_and_time_left(monkeypatch):
    now, shown = [0.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    console = Console()
    monkeypatch.setattr(console, "progress", lambda what, done, total, detail: shown.append(detail))
    moved = console.transfer("pull")
    for second in (0, 12, 40):
        now[0] = float(second)
        moved(second * MIB, 40 * MIB)
    assert shown == ["0.0 of 40.0 MiB", "12.0 of 40.0 MiB, 28 s left", "40.0 of 40.0 MiB"]


def test_rate_without_a_terminal_is_a_line_each_minute(capfd, monkeypatch):
    """`tandem distill` wrote text for an hour without a rate or the time left."""
    times = iter([0.0, 30.0, 61.0])
    monkeypatch.setattr(module.time, "monotonic", times.__next__)
    show = Console().rate("text", "answer tokens")
    show(0, 1_000_000, 0.0)
    show(5_000, 1_000_000, 250.0)
    show(10_000, 1_000_000, 250.0)
    show(1_000_000, 1_000_000, 250.0)
    assert capfd.readouterr().err == "text: 10,000 of 1,000,000 answer tokens, 250 per second, about 1 h 6 min left\n"


def test_coloured_colours_verdicts_and_warnings_alone():
    assert coloured("  parity: passed") == "  parity: \x1b[32mpassed\x1b[0m"
    assert coloured("  parity: FAILED") == "  parity: \x1b[31mFAILED\x1b[0m"
    assert coloured("warning: 3 prompts").startswith("\x1b[33mwarning:\x1b[0m ")
    assert coloured("passed by") == "passed by"
    assert coloured("package (0.1 s)") == "package (0.1 s)"


ERROR = "from pipeline.cli.main import main; main(['inspect', 'nowhere'], standalone_mode=False)"


@pytest.mark.parametrize(("env", "has_colour"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_errors_on_a_terminal_have_colour_unless_no_color(env, has_colour):
    shown = on_terminal(f"try:\n    {ERROR}\nexcept SystemExit:\n    pass", **env)
    assert ("\x1b[" in shown) == has_colour
    assert "wrong input: " in shown.replace("\x1b[31m", "").replace("\x1b[0m", "")


TABLE = (
    "from pipeline.cli.results import print_table\nfrom pipeline.cli.tables import Table\n"
    "print_table(Table(('name', 'size'), [('a', '1 B')]))\n"
)


@pytest.mark.parametrize(("env", "has_codes"), [({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False)])
def test_tables_on_a_terminal_have_no_codes_with_no_color(env, has_codes):
    """NO_COLOR kept the bold headings; the empty value, which has no effect, was documented as `any value`."""
    assert ("\x1b[" in on_terminal(TABLE, **env)) == has_codes


def test_errors_on_a_terminal_break_between_words():
    """At 80 columns a line ended inside a word. A fix stays one line: it is copied."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    subprocess.run(
        [sys.executable, "-c", f"try:\n    {ERROR}\nexcept SystemExit:\n    pass"], stderr=theirs, check=True,
        env=os.environ | {"TERM": "xterm", "NO_COLOR": "1"},
    )  # fmt: skip
    os.close(theirs)
    lines = os.read(ours, 1 << 16).decode().splitlines()
    os.close(ours)
    assert lines[0] == "wrong input: ARTIFACT: no artifact"
    assert lines[1] == "    'nowhere': no folder `nowhere` or"
    assert lines[-1].startswith("  fix: name an artifact's folder; in artifacts/:")
