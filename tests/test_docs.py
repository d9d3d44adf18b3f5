"""Documents and docstrings name files that exist, and describe the rooms as they are. Imports no torch."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.paths import ROOT
from support.python_source import nodes

FOLDERS = ("pipeline", "tandem_spec", "examples", "tests", "docs", "benchmarks", "scripts", "deploy")
MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "pipeline").rglob("*.py"))
PACKAGES = [path.parent for path in MODULES if path.name == "__init__.py" and path.parent.name != "pipeline"]
ROOMS = [path for path in PACKAGES if path.parent.name == "pipeline"]
PAGES = [
    *(
        "README.md",
        "CONTRIBUTING.md",
        "STYLE.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "artifacts/README.md",
        "recipes/README.md",
    ),
    *("Makefile", "tests/conftest.py"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
PATH = re.compile(rf"(?<![\w/.-])(?P<path>(?:{'|'.join(FOLDERS)})/[\w./@-]*\w/?)(?:::(?P<test>\w+))?")
IN_A_ROOM = re.compile(rf"`(?P<path>(?:{'|'.join(path.name for path in ROOMS)})/[\w/]+\.py)`")
LINK = re.compile(r"\]\((?P<path>[^)#:]+)(?:#[^)]*)?\)")
BARE = re.compile(r"`(?P<path>\w+\.py)`")


def missing(text: str) -> Iterator[str]:
    """Paths of the repository, and tests in them, that a text names and that do not exist."""
    for match in PATH.finditer(text):
        path, test = ROOT / match["path"], match["test"]
        if not path.exists() or (test and f"def {test}(" not in path.read_text()):
            yield match[0]
    for match in IN_A_ROOM.finditer(text):
        if not any((ROOT / folder / match["path"]).exists() for folder in ("pipeline", "tests")):
            yield match["path"]


def missing_bare(text: str) -> list[str]:
    """File names without a folder that a text names and that no folder has."""
    return [
        match["path"]
        for match in BARE.finditer(text)
        if not any(next((ROOT / folder).rglob(match["path"]), None) for folder in FOLDERS)
    ]


def page(name: str) -> str:
    """The text of a document; of the changelog the unreleased section, since the others name files of their time."""
    text = (ROOT / name).read_text()
    return "\n## ".join(text.split("\n## ")[:2]) if name == "CHANGELOG.md" else text


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""


def docstrings(folder: str) -> Iterator[tuple[str, str]]:
    """Every docstring of a folder, with the file it is in."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        found = () if "/fake_" in name else nodes(path.read_text())
        yield from (
            (name, text) for node in found if isinstance(node, documented) and (text := ast.get_docstring(node))
        )


@pytest.mark.parametrize("name", PAGES)
def test_documents_name_files_that_exist(name):
    """The README named a module that had become a folder; other pages named modules that had moved or were removed."""
    text = page(name)
    assert list(missing(text)) == []
    assert name != "README.md" or missing_bare(text) == []


def broken_links(name: str) -> list[str]:
    """Relative links of a page that lead to no file; mkdocs checks anchors, and links between pages of `docs/`."""
    folder = (ROOT / name).parent
    return [match["path"] for match in LINK.finditer(page(name)) if not (folder / match["path"]).exists()]


@pytest.mark.parametrize("name", [name for name in PAGES if name.endswith(".md")])
def test_links_lead_to_files(name):
    """Pages moved from docs/ into folders; links from the README and from recipes/ still led to the old places."""
    assert broken_links(name) == []


def test_readme_links_to_the_pages():
    """No page would be checked if the links were written in a form that the pattern does not match."""
    links = [match["path"] for match in LINK.finditer(page("README.md"))]
    assert {"docs/tutorial.md", "docs/results.md", "CHANGELOG.md"} <= {*links}


@pytest.mark.parametrize("folder", ["pipeline", "tests", "benchmarks"])
def test_docstrings_name_files_that_exist(folder):
    texts = list(docstrings(folder))
    assert len(texts) > 10
    assert [(name, path) for name, text in texts for path in missing(text)] == []
    if folder == "pipeline":
        assert [(name, path) for name, text in texts for path in missing_bare(text)] == []


@pytest.mark.parametrize(
    "text",
    [
        "see `pipeline/recipe.py`.",
        "(`runtime/pace.py`)",
        "tests/test_gone.py",
        "`docs/gone.md`",
        "`tests/test_docs.py::test_gone`",
        "the folder pipeline/gone/",
    ],
)
def test_missing_finds_a_path_that_is_gone(text):
    assert len(list(missing(text))) == 1


def test_missing_accepts_paths_that_exist():
    text = "`pipeline/build.py`, pipeline/backends/, `cli/main.py`; tests/test_docs.py::test_package_maps_every_room."
    assert list(missing(text)) == []
    assert missing_bare("`phases.py` and `gone.py`") == ["gone.py"]


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.name)
def test_room_names_the_rooms_that_enter(room):
    """import-linter checks that imports go down; the first lines of a room say which of those above use it."""
    (entered,) = re.findall(r"^Entered by (.+)\.$", docstring(room / "__init__.py"), re.M)
    if entered != "every room above":
        assert importers(room.name) <= set(re.findall(r"\w+", entered))


@pytest.mark.parametrize("package", [path for path in PACKAGES if path not in ROOMS], ids=lambda path: path.name)
def test_folder_in_a_room_says_who_enters(package):
    assert re.search(r"^Entered (by|through) ", docstring(package / "__init__.py"), re.M)


def importers(room: str) -> set[str]:
    """Rooms and single modules of `pipeline/` that import from a room."""
    imports = re.compile(rf"^\s*(?:from|import) pipeline\.{room}\b|^\s*from pipeline import .*\b{room}\b", re.M)
    users = {path.parts[1].removesuffix(".py") for path in MODULES if imports.search((ROOT / path).read_text())}
    return users - {room}


def rooms_section() -> list[str]:
    """Code blocks of the section Rooms: the tree, and the order of imports."""
    text = (ROOT / "docs/explanation/architecture.md").read_text()
    (section,) = re.findall(r"^## Rooms\n(.*?)^## ", text, re.M | re.S)
    return re.findall(r"^```\w*\n(.*?)^```", section, re.M | re.S)


def test_architecture_lists_every_module():
    """Each module below its own folder, each folder once."""
    tree, _ = rooms_section()
    _, *entries = re.split(r"^ +(\w+)/ ", tree, flags=re.M)
    words = {name: set(re.findall(r"\w+", text)) for name, text in zip(entries[::2], entries[1::2], strict=True)}
    assert sorted(entries[::2]) == sorted(path.name for path in PACKAGES)
    modules = [path for path in MODULES if path.name != "__init__.py" and path.parent.name != "pipeline"]
    assert [str(path) for path in modules if path.stem not in words[path.parent.name]] == []


def test_architecture_has_the_order_of_imports():
    _, order = rooms_section()
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["id"] == "rooms"]
    assert order.splitlines() == layers


def test_package_maps_every_room():
    entries = re.findall(r"^    ([\w.]+)/? +\S", docstring(Path("pipeline/__init__.py")), re.M)
    modules = [path.name for path in MODULES if path.parent.name == "pipeline" and path.name != "__init__.py"]
    assert sorted(entries) == sorted([*(path.name for path in ROOMS), *modules])
