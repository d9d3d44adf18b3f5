"""The compiler of `CXX`: launchers, flags, odd paths, and commands that are no compiler. Stand-ins answer for it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.backends.inductor.backend import InductorBackend
from pipeline.backends.inductor.compiler import Compiler, failure, from_environment, use
from pipeline.errors import HostError
from pipeline.graphs.spec import GraphSpec
from pipeline.recipe.backend_settings import InductorSettings
from pipeline.stages.compile import Job, compile_all
from support.pairs import make_pair
from support.paths import PYTHONPATH

GCC = "g++ (Distribution 13.1.0) 13.1.0\nCopyright (C) 2023 Free Software Foundation, Inc."
CLANG = "Some clang version 18.1.3\nTarget: x86_64-pc-linux-gnu"


def stand_in(path: Path, banner: str, version: str = "13.1.0", otherwise: str = "exit 1") -> Path:
    """A program that answers as a compiler does when it is asked for its name and version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"#!/bin/sh\ncase \"$*\" in\n  *--version*) echo '{banner}';;\n  *-dumpversion*) echo {version};;\n"
        f"  *) {otherwise};;\nesac\n"
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH with g++, clang++, c++ (GCC) and ccache; its path has a space."""
    folder = tmp_path / "my tools"
    for name, banner in {"g++": GCC, "clang++": CLANG, "c++": GCC, "mygpp": GCC}.items():
        stand_in(folder / name, banner, "18.1.3" if banner == CLANG else "13.1.0")
    for name in ("ccache", "nice"):
        (folder / name).write_text('#!/bin/sh\nexec "$@"\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def problem_of(cxx: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, str]:
    monkeypatch.setenv("CXX", cxx)
    (problem,) = InductorBackend(InductorSettings()).preflight()
    return problem.where, problem.what, problem.fix


READ = {
    "": Compiler((), "g++"),
    "  ": Compiler((), "g++"),
    "clang++": Compiler((), "clang++"),
    "ccache g++": Compiler(("ccache",), "g++"),
    "ccache": Compiler(("ccache",), "g++"),
    "sccache distcc clang++ -O2": Compiler(("sccache", "distcc"), "clang++", ("-O2",)),
    "g++ -pipe": Compiler((), "g++", ("-pipe",)),
    "  g++   -DA='b c' ": Compiler((), "g++", ("-DA=b c",)),
    "'/opt/my tools/g++' -m64": Compiler((), "/opt/my tools/g++", ("-m64",)),
}


@pytest.mark.parametrize(("cxx", "compiler"), READ.items())
def test_from_environment(cxx: str, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """`CXX` was one word: `ccache g++` and an empty variable were programs that are not on PATH."""
    monkeypatch.setenv("CXX", cxx)
    assert from_environment() == compiler


def test_from_environment_runs_gcc_behind_a_launcher_alone(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "ccache")
    assert from_environment().words == ("ccache", "g++")


def test_from_environment_takes_a_path_with_spaces(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tools / "g++"))
    assert from_environment() == Compiler((), str(tools / "g++"))
    assert from_environment().identity().version == "13.1.0"


REFUSED = {
    "an open quote": ("g++ '-pipe", "quote that is not closed", "set CXX"),
    "no such program": ("g++-99", "`g++-99` is not on PATH", "set CXX"),
    "no such path": ("/nowhere/g++ -pipe", "no program `/nowhere/g++`", "set CXX"),
    "no compiler behind the launcher": ("ccache g++-99", "`g++-99` is not on PATH", "set CXX"),
    "no such launcher": ("sccache g++", "`sccache` is not on PATH", "set CXX"),
    "a program that fails": ("false", "`false` cannot be used: `--version` ended with status 1", "set CXX"),
    "another program": ("echo", "`echo -dumpversion` prints no version", "set CXX"),
    "a program of another kind": ("python", "none of GCC, Clang", "set CXX"),
}


@pytest.mark.parametrize(("cxx", "what", "fix"), REFUSED.values(), ids=REFUSED)
def test_preflight_names_a_command_that_is_no_compiler(
    cxx: str, what: str, fix: str, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that fails passed as a compiler of version `missing`, and each compilation failed."""
    where, found, remedy = problem_of(cxx, monkeypatch)
    assert where == "CXX"
    assert what in found
    assert fix in remedy


def test_preflight_without_cxx_names_the_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert problem_of("", monkeypatch) == (
        "backend.name", "inductor needs a C++ compiler; `g++` is not on PATH", "install g++"
    )  # fmt: skip


def facts(cxx: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str | None]:
    monkeypatch.setenv("CXX", cxx)
    backend = InductorBackend(InductorSettings())
    assert backend.preflight() == []
    return backend.toolchain().versions["cxx"], backend.flags().get("cxx")


@pytest.mark.parametrize(
    ("cxx", "expected"),
    [
        ("", ("13.1.0", None)), ("ccache g++", ("13.1.0", None)), ("c++", ("13.1.0", None)),
        ("g++ -pipe -O1", ("13.1.0", "-pipe -O1")), ("clang++", ("clang 18.1.3", None)),
        ("ccache clang++ -O1", ("clang 18.1.3", "-O1")), ("nice g++", ("13.1.0", "g++")),
    ],
)  # fmt: skip
def test_key_has_the_compiler_and_its_flags_but_no_launcher(
    cxx: str, expected: tuple[str, str | None], tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GCC and Clang of one version had one key, and so had all flags."""
    assert facts(cxx, monkeypatch) == expected


def test_preflight_compares_the_version_of_the_recipe(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "ccache clang++")
    assert InductorBackend(InductorSettings(cxx="18")).preflight() == []
    (problem,) = InductorBackend(InductorSettings(cxx="13")).preflight()
    assert "'ccache clang++' is version 18.1.3" in problem.what


@pytest.mark.parametrize(
    ("cxx", "name"), [("g++", None), ("clang++", None), ("ccache g++", "g++"), ("clang++ -O1", "clang++"),
                      ("c++", "g++"), ("mygpp", "g++")],
)  # fmt: skip
def test_executable_is_one_word_by_which_inductor_knows_the_compiler(
    cxx: str, name: str | None, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor takes the kind of a compiler from its name, and runs `[CXX, "--version"]`."""
    monkeypatch.setenv("CXX", cxx)
    word = from_environment().executable(tmp_path / "scripts")
    assert word == cxx if name is None else Path(word).name == name
    assert subprocess.run([word, "-dumpversion"], capture_output=True, text=True, check=True).stdout.strip() == (
        "18.1.3" if "clang" in cxx else "13.1.0"
    )
    assert from_environment().executable(tmp_path / "scripts") == word


def test_executable_runs_a_relative_command_from_any_folder(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tools)
    monkeypatch.setenv("CXX", "./g++")
    word = from_environment().executable(tmp_path / "scripts")
    assert subprocess.run([word, "-dumpversion"], cwd="/", capture_output=True, check=True).stdout == b"13.1.0\n"


def test_use_quotes_folders_of_libraries(tools: Path, tmp_path: Path) -> None:
    """torch in a folder with a space: `-L/my env/lib` was split at the space."""
    from torch._inductor.cpp_builder import BuildOptionsBase

    use(from_environment(), tmp_path)
    folders = BuildOptionsBase(libraries_dirs=["/my env's/lib", "/usr/lib"]).get_libraries_dirs()
    assert shlex.split(" ".join(f"-L{folder}" for folder in folders)) == ["-L/my env's/lib", "-L/usr/lib"]


OUTPUT = """In file included from a.h:1:
a.cpp: In function 'int main()':
a.cpp:3:10: error: 'x' was not declared in this scope
    3 |   return x;
a.cpp:4:1: error: expected ';'
a.cpp:5:1: error: expected ';'
a.cpp:6:1: error: expected ';'
a.cpp:7:1: error: expected ';'
"""


def test_failure_has_the_first_error_lines_and_the_command() -> None:
    text = failure(Compiler(("ccache",), "g++"), ["/scripts/g++", "-O2", "/tmp/a.cpp", *["-D X"] * 50], OUTPUT)
    assert text.splitlines()[0] == "the C++ compiler failed: `ccache g++ /tmp/a.cpp ...`"
    assert text.splitlines()[1].strip() == "a.cpp:3:10: error: 'x' was not declared in this scope"
    assert text.splitlines()[-1].strip() == "... 1 more"


@pytest.mark.parametrize(("output", "shown"), [("", "no output"), ("killed\n", "killed"), ("x" * 999, "x" * 200)])
def test_failure_without_an_error_line_has_the_first_lines(output: str, shown: str) -> None:
    assert failure(Compiler((), "g++"), ["g++", "a.cpp"], output).splitlines()[1:] == [f"    {shown}"]


@pytest.mark.compile
def test_failed_compile_shows_the_compilers_words_and_the_log_has_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error was `CppCompileError: C++ compile error`."""
    lines = "; ".join(f"echo 'a.h:{n}:1: error: fault {n}' >&2" for n in range(1, 9))
    monkeypatch.setenv("CXX", str(stand_in(tmp_path / "g++", GCC, otherwise=f"{lines}; exit 1")))
    spec, log = GraphSpec("score", 1, 4, 40, model="draft"), tmp_path / "logs" / "score.log"
    job = Job(spec, make_pair().shape, InductorSettings(), tmp_path / "cache", log)
    with pytest.raises(HostError) as caught:
        compile_all([job], 1, lambda _: None)
    error = caught.value
    assert error.where == f"compile {spec.name}"
    assert error.what.splitlines()[0].startswith(f"the C++ compiler failed: `{tmp_path}/g++ /")
    assert "a.h:1:1: error: fault 1" in error.what.splitlines()[1]
    assert error.fix == f"the command and its whole output are in {log}"
    assert "a.h:8:1: error: fault 8" in log.read_text(encoding="utf-8")
    assert "-std=c++" in log.read_text(encoding="utf-8")


JUST_IN_TIME = """
import torch
from pipeline.backends.inductor.just_in_time import compiled
from pipeline.errors import HostError
try:
    compiled(lambda x: (x + 1,))(torch.zeros(3))
except HostError as error:
    print(error.what, error.fix, sep=chr(10))
"""


@pytest.mark.slow
def test_just_in_time_compiles_in_a_usable_folder_and_explains_a_failure(tmp_path: Path) -> None:
    """`tandem distill` ended with a traceback, and used TMPDIR with its space."""
    compiler = stand_in(tmp_path / "g++", GCC, otherwise='echo "a.h:1:1: error: fault in $*" >&2; exit 1')
    (tmp_path / "a b").mkdir()
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "TMPDIR": str(tmp_path / "a b"), "CXX": str(compiler)}
    done = subprocess.run(
        [sys.executable, "-c", JUST_IN_TIME], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"the C++ compiler failed: `{compiler} /")
    assert "    a.h:1:1: error: fault in " in done.stdout
    assert str(tmp_path / "a b") not in done.stdout
    assert "set CXX" in done.stdout


ODD = """
import hashlib, pathlib, sys, torch
from support.compiled import run_compiled
class Plus(torch.nn.Module):
    def forward(self, x):
        return (x + 1,)
work = pathlib.Path("odd 'work' $HOME;é")
work.mkdir()
((out,),) = run_compiled({"plus": (Plus(), (torch.zeros(3),))}, work, precompile=False).values()
assert out.tolist() == [1, 1, 1]
"""


@pytest.mark.slow
def test_compile_and_load_in_an_odd_environment(tmp_path: Path) -> None:
    """Every compilation failed with a space in TMPDIR, and with a launcher or flags in CXX."""
    folder, calls = tmp_path / "tmp with 'spaces'", tmp_path / "calls"
    folder.mkdir()
    ccache = tmp_path / "my tools" / "ccache"
    ccache.parent.mkdir()
    ccache.write_text(f'#!/bin/sh\necho "$@" >> {shlex.quote(str(calls))}\nexec "$@"\n')
    ccache.chmod(0o755)
    environment = os.environ | {
        "PYTHONPATH": PYTHONPATH, "TMPDIR": str(folder), "CXX": f"{shlex.quote(str(ccache))} g++ -pipe",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ODD], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("g++ -pipe ") for line in calls.read_text(encoding="utf-8").splitlines())
