"""Messages made from other libraries' exceptions: what they say, never what their Python types are called."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.errors import HostError, InputError, PreflightError, Problem, RecipeError, reason
from pipeline.stages.compile import _compile

PACKAGE = Path(__file__).parents[1] / "pipeline"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyError("id"), "missing key: 'id'"),
        (ValueError("\n  first\nsecond"), "first"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), "No such file or directory: a.json"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("odd"), "odd"),
        (RuntimeError(), "no details"),
        (MemoryError(), "out of memory"),
        (InputError("wrong", where="here"), "here: wrong"),
    ],
)
def test_reason_is_what_the_exception_says(error, says):
    assert reason(error) == says


@pytest.mark.parametrize(
    ("error", "what"), [(KeyError("aten.foo"), "missing key: 'aten.foo'"), (RuntimeError("bad code\nmore"), "bad code")]
)
def test_failed_compile_shows_the_reason_and_leaves_the_rest_to_the_log(tmp_path, capsys, error, what):
    """The message used to begin with the exception's type: `RuntimeError: bad code`."""

    def failing() -> bytes:
        raise error

    job = SimpleNamespace(spec=SimpleNamespace(name="decode"), log_file=tmp_path / "log.txt")
    with pytest.raises(HostError) as caught:
        _compile(job, failing)
    assert caught.value.what == what
    assert type(error).__name__ in capsys.readouterr().err, "the log has the traceback"


def test_no_message_shows_an_exceptions_name():
    """Messages used to be made of `repr(error)` or of the name of its type: `not a prompt: KeyError('id')`."""
    shown = re.compile(r"\{(error|exc)!r\}|\{type\((error|exc)\)\.__name__\}|, type\((error|exc)\)\.__name__\)")
    lines = [(path, line) for path in sorted(PACKAGE.rglob("*.py")) for line in path.read_text().splitlines()]
    assert len(lines) > 10_000
    assert [f"{path.relative_to(PACKAGE)}: {line}" for path, line in lines if shown.search(line)] == []


@pytest.mark.parametrize("kind", [RecipeError, PreflightError])
def test_error_of_several_problems_survives_a_worker(kind):
    """Unpickling called `__init__` with the text, which broke the pool of workers instead of showing the problems."""
    error = kind([Problem("a", "first", "fix it"), Problem("b", "second")])
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.problems, copy.fix, str(copy)) == (kind, error.problems, "fix it", str(error))
