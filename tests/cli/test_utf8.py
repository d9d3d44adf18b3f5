"""Text is UTF-8 whatever the locale: what is read, what the command line gets, what is printed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from click import BadParameter

from pipeline.cli.utf8 import Utf8Text
from support import odd_tokenizers as odd
from support.commands import RECIPE
from support.paths import ROOT
from support.run_stand_in import ANSWER

PROMPT = "caf\u00e9 \u4f60\u597d"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
COMMAND = (sys.executable, "-c", "from pipeline.cli.main import main; main()")
READ = """
import json, sys, warnings
warnings.filterwarnings("error", category=EncodingWarning, module="pipeline")
from pathlib import Path
from pipeline.runtime.text import Text
from pipeline.validate.prompts import load_prompts
from pipeline.distill.prompts import read_prompts
from pipeline.recipe import load
text, prompts = Text(Path("tokenizer")), load_prompts(Path("prompts.jsonl"))
print(json.dumps([text.encode_prompt(p.text) for p in prompts] + [read_prompts(Path("prompts.jsonl"))]))
print(json.dumps(load(Path("recipe.yaml")).target.source))
"""


@pytest.fixture(scope="module")
def latin1(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The environment of a Latin-1 locale."""
    folder = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef") is None:
        pytest.skip("no localedef")
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", folder / "en_US.ISO-8859-1"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no definitions of locales")
    return {"LOCPATH": str(folder), "LC_ALL": "en_US.ISO-8859-1"}


@pytest.fixture(params=["ascii", "latin1"])
def locale(request: pytest.FixtureRequest) -> Mapping[str, str]:
    """The environment of a locale without UTF-8."""
    return ASCII if request.param == "ascii" else dict(request.getfixturevalue("latin1"))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A tokenizer, prompts and a recipe with text outside ASCII."""
    odd.words_without_ascii(tmp_path / "source")
    odd.packed(odd.checkpoint_of(tmp_path / "source"), tmp_path / "tokenizer")
    line = json.dumps({"class": "chat", "prompt": PROMPT}, ensure_ascii=False)
    (tmp_path / "prompts.jsonl").write_text(line, encoding="utf-8")
    recipe = RECIPE.replace("./target", "./caf\u00e9")
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return tmp_path


def process(
    command: tuple[str | bytes | Path, ...], work: Path, locale: Mapping[str, str], *, utf8: bool = False
) -> subprocess.CompletedProcess[bytes]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    locale = {"LC_ALL": "C.UTF-8"} if utf8 else locale
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**kept, **locale, "PYTHONPATH": paths, "TANDEM_TEST_TOKENS": str(work / "tokens")}
    return subprocess.run(command, cwd=work, env=environment, capture_output=True, check=False)


def test_files_are_read_as_utf8(locale: Mapping[str, str], work: Path) -> None:
    """Under Latin-1, begin-of-sequence became other tokens without an error; under ASCII, a traceback."""
    command = (sys.executable, "-X", "warn_default_encoding", "-W", "ignore::EncodingWarning", "-c", READ)
    wanted = process(command, work, {}, utf8=True)
    assert wanted.returncode == 0, wanted.stderr
    given = process(command, work, locale)
    assert given.returncode == 0, given.stderr
    assert given.stdout == wanted.stdout
    assert json.loads(given.stdout.splitlines()[1]) == "./caf\u00e9"


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_run_is_the_same_in_every_locale(options: tuple[str, ...], locale: Mapping[str, str], work: Path) -> None:
    """The prompt became lone surrogates or other characters, and the answer ended in a UnicodeEncodeError."""
    script = ROOT / "tests/support/run_stand_in.py"
    command = (sys.executable, script, "run", work / "tokenizer", "--prompt", PROMPT.encode(), *options)
    wanted = process(command, work, {}, utf8=True)
    assert wanted.returncode == 0, wanted.stderr
    tokens = json.loads((work / "tokens").read_text(encoding="utf-8"))
    (work / "tokens").unlink()
    given = process(command, work, locale)
    assert given.returncode == 0, given.stderr
    assert given.stdout == wanted.stdout
    assert json.loads((work / "tokens").read_text(encoding="utf-8")) == tokens
    if "--json" in options:
        assert json.loads(given.stdout)["text"] == ANSWER
    else:
        assert given.stdout.decode() == f"{ANSWER}\n"


def test_output_is_utf8_whatever_the_streams_encoding(work: Path) -> None:
    """`PYTHONIOENCODING=ascii` ended in a UnicodeEncodeError."""
    script = ROOT / "tests/support/run_stand_in.py"
    command = (sys.executable, script, "run", work / "tokenizer", "--prompt", "a")
    given = process(command, work, {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii"})
    assert given.stdout.decode() == f"{ANSWER}\n", given.stderr


@pytest.mark.parametrize("name", ["caf\u00e9.yaml".encode(), b"caf\xe9.yaml"])
def test_names_of_files_are_bytes(name: bytes, locale: Mapping[str, str], work: Path) -> None:
    """A recipe with a name outside ASCII; its sources, which YAML writes in UTF-8, are found too."""
    recipe = os.fsencode(work) + b"/" + name
    os.rename(work / "recipe.yaml", recipe)  # noqa: PTH104 - a name that may not be UTF-8
    (work / "caf\u00e9").mkdir()
    for environment in ({"LC_ALL": "C.UTF-8"}, locale):
        given = process((*COMMAND, "recipe", "check", recipe), work, environment)
        assert given.returncode == 2, given.stderr
        assert b"Traceback" not in given.stderr
        assert "caf\u00e9/config.json: file is missing" in given.stderr.decode()


def test_changed_recipes_reads_paths_as_bytes(work: Path) -> None:
    """`str.splitlines` cut paths at U+2028, and a path that is not UTF-8 ended in a traceback."""
    (work / "recipes").mkdir()
    (work / "recipe.yaml").rename(work / "recipes" / "mine.yaml")
    paths = b"docs/a\xe2\x80\xa8recipes/mine.yaml\n\ncaf\xe9\n"
    for given, wanted in ((paths, []), (paths + b"recipes/mine.yaml\r\n", ["mine"])):
        done = subprocess.run(
            (*COMMAND, "recipe", "changed", "-"), input=given, cwd=work, capture_output=True, check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert json.loads(done.stdout) == wanted


def test_text_argument_that_is_not_utf8_is_named() -> None:
    """The message used to come after the artifact was loaded, and named a lone surrogate."""
    assert Utf8Text().convert("caf\u00e9", None, None) == "caf\u00e9"
    with pytest.raises(BadParameter, match="not UTF-8: byte 0xe9 at index 3"):
        Utf8Text().convert("caf\udce9", None, None)
