"""The pages of docs/reference/ are what the code says, and name everything that the code has."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tandem_spec
from pipeline.artifact.manifest import MANIFESTS
from pipeline.build import build as real_build
from pipeline.cli.main import main
from pipeline.validate.report.schema import schema as report_schema
from support import small_artifacts
from support.paths import ROOT
from support.python_source import nodes

REFERENCE = ROOT / "docs" / "reference"
GENERATOR = ROOT / "docs" / "make_reference.py"
PREFIXES = "TANDEM|AWS|HF|NEURON|VLLM|GITHUB|SIGSTORE|ACTIONS|PIP|TORCHINDUCTOR|GLOO|OMP"
VARIABLE = re.compile(rf"(?:{PREFIXES})_[A-Z0-9_]*[A-Z0-9]")
NO_VARIABLES = {
    "NEURON_COMPILE_CACHE",  # the beginning of names that the backend ignores, as the next ones
    "NEURON_CPP_LOG",
    "TANDEM_AMX",  # macros of C++
    "TANDEM_BF16",
}
DATACLASSES = {
    "Clamp", "DeltaNet", "DividedRope", "Eagle3", "Experts", "GraphSpec", "Layer", "Limit", "LinearRope", "Llama3Rope",
    "Markov", "ModelConfig", "ModelsSpec", "Norms", "PairSpec", "ProportionalRope", "Ring", "Rope", "TapIds",
    "YarnRope",
}  # fmt: skip
"""Their docstrings describe their fields."""


def generate(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(GENERATOR), *options], capture_output=True, text=True, check=False)


def test_pages_are_what_the_code_says():
    done = generate("--check")
    assert done.returncode == 0, done.stderr


def test_check_names_a_stale_page(tmp_path):
    """In a copy of the generator whose page differs; the code is still this checkout's."""
    for path in (ROOT / "docs").glob("make_*.py"):
        (tmp_path / "docs").mkdir(exist_ok=True)
        (tmp_path / "docs" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "pipeline").symlink_to(ROOT / "pipeline")
    (tmp_path / "docs" / "reference").mkdir()
    for path in REFERENCE.glob("*.md"):
        text = (
            path.read_text().replace("C++ compiler", "compiler") if path.name == "environment.md" else path.read_text()
        )
        (tmp_path / "docs" / "reference" / path.name).write_text(text)
    command = [sys.executable, str(tmp_path / "docs" / "make_reference.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("stale pages in docs/reference/: environment.md\n")


def test_generator_imports_no_torch():
    code = f"import runpy, sys; runpy.run_path({str(GENERATOR)!r}); print('torch' in sys.modules)"
    environment = {"PYTHONPATH": f"{GENERATOR.parent}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "False\n"


def listed_variables() -> set[str]:
    return set(re.findall(r"^\| `(\w+)` \|", (REFERENCE / "environment.md").read_text(), re.M))


def read_variables(text: str) -> Iterator[str]:
    """Names of variables in a module: those that it reads or sets, and every text with the form of one."""
    for node in nodes(text):
        if isinstance(node, ast.keyword) and node.arg == "envvar":
            yield ast.literal_eval(node.value)
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            yield from constant(node.slice)
        elif (
            isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("os.environ.", "os.getenv")) and node.args
        ):
            yield from constant(node.args[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and VARIABLE.fullmatch(node.value):
            yield node.value


def constant(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant):
        yield node.value


def test_environment_page_has_every_variable_of_the_code():
    used = {name for path in (ROOT / "pipeline").rglob("*.py") for name in read_variables(path.read_text())}
    assert {"TANDEM_CACHE", "TANDEM_ARTIFACT", "TANDEM_REMOTE_CACHE", "CXX", "AWS_SKIP_SIGNATURE"} <= used
    assert used - NO_VARIABLES - listed_variables() == set()


def test_environment_page_has_every_variable_of_scripts_and_workflows():
    scripts = "\n".join(path.read_text() for path in (ROOT / "scripts" / "ci").glob("*.sh"))
    workflows = "\n".join(path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml"))
    used = set(re.findall(r"\$\{([A-Z][A-Z0-9_]+)(?::?[-?=])", scripts))
    used |= set(re.findall(r"\b(?:vars|secrets)\.(\w+)", workflows))
    used |= set(re.findall(r"^(\w+)\s*\?=", (ROOT / "Makefile").read_text(), re.M))
    assert {"REGISTRY", "TANDEM_RUNNER", "VENV"} <= used
    assert used - listed_variables() == set()


def test_environment_page_lists_no_variable_that_nothing_names():
    folders = ("pipeline", "scripts", ".github", "tests/backends", "docs")
    files = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".sh", ".yml", ".md"}
    ]
    texts = [path.read_text() for path in files if path.parent != REFERENCE and path.name != "make_environment.py"]
    text = "\n".join([*texts, (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()])
    completion = {"_TANDEM_COMPLETE"}  # click makes this name
    assert {name for name in listed_variables() - completion if not re.search(rf"\b{name}\b", text)} == set()


def test_commands_page_describes_every_option():
    """Eight options of `run`, `bench`, `tune` and `doctor` had no help."""
    rows = re.findall(r"^\| `-.*$", (REFERENCE / "commands.md").read_text(), re.M)
    assert len(rows) > 60
    assert [row for row in rows if not re.search(r"[\w)]\. \|", row)] == []


def test_commands_page_has_every_command():
    page = (REFERENCE / "commands.md").read_text()
    assert [name for name in main.commands if not re.search(rf"^## tandem {name}\b", page, re.M)] == []


def undescribed(schema: dict) -> list[str]:
    """Fields without a description, but for the ones that tell kinds apart."""
    sections = {"": schema, **schema["$defs"]}
    return [
        f"{section}.{name}"
        for section, node in sections.items()
        if section not in DATACLASSES
        for name, value in node.get("properties", {}).items()
        if "description" not in value and "const" not in value
    ]


@pytest.mark.parametrize("schema", [MANIFESTS.json_schema(), report_schema()], ids=["manifest", "report"])
def test_every_field_is_described(schema):
    assert undescribed(schema) == []


def examples() -> list[str]:
    intro = (REFERENCE / "python.md").read_text().partition("\n## Recipes")[0]
    return re.findall(r"^```python\n(.*?)^```", intro, re.M | re.S)


@pytest.fixture
def loaded(tmp_path, monkeypatch) -> None:
    """`load` gives an engine that runs without a compiler."""
    from pipeline import runtime
    from pipeline.sources.pair import resolve_pair
    from support.eager import make_engine
    from support.reports import recipe_of

    def load(artifact):
        recipe = recipe_of("llama", 1, "float32", ("greedy", "stochastic", "shaped"))
        return make_engine(recipe, resolve_pair(recipe, base=tmp_path, cache=tmp_path / "sources"))

    monkeypatch.setattr(runtime, "load", load)


@pytest.mark.usefixtures("loaded")
def test_example_generates(capsys):
    exec(compile(examples()[0], "example", "exec"), {})
    *answers, stats = capsys.readouterr().out.strip().splitlines()
    assert len(answers) >= 2
    assert ast.literal_eval(stats)["tokens"] > 0


@pytest.mark.usefixtures("loaded")
def test_example_of_the_readme_runs(capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    exec(compile(example, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 3


@pytest.mark.usefixtures("loaded")
def test_example_follows_rules(capsys):
    exec(compile(examples()[1], "example", "exec"), {})
    assert capsys.readouterr().out.lstrip().startswith("{")


@pytest.mark.usefixtures("loaded")
def test_example_streams(capsys):
    exec(compile(examples()[2], "example", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_example_builds_publishes_and_pulls(tmp_path, monkeypatch, capsys):
    """It called `build` with `log=`, which `build` does not take."""
    inspect.signature(real_build).bind(Path("recipe.yaml"))

    def build(recipe):
        return small_artifacts.make_validated(Path("artifacts") / recipe.stem, tmp_path / "work")

    monkeypatch.setattr("pipeline.build.build", build)
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "pipeline.registry.pull.host_facts", lambda: {"device": "cpu", "machine": "x86_64", "isa": "avx2"}
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(examples()[3], "example", "exec"), {})
    assert capsys.readouterr().out.strip().endswith("artifacts/pulled/latest")
    assert (tmp_path / "artifacts/pulled/latest/manifest.json").is_file()


def test_example_handles_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(examples()[4], "example", "exec"), {})
    assert "no manifest" in capsys.readouterr().out


@pytest.mark.parametrize("page", sorted(REFERENCE.glob("*.md")), ids=lambda path: path.name)
def test_links_inside_the_reference_resolve(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        other = (page.parent / file).read_text() if file and "/" not in file else text
        if "/" not in file and anchor:
            assert anchor in anchors(other), target


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_python_page_documents_every_public_name():
    """Errors are on a page of their own; the other names without an entry are types of results and parameters."""
    page = (REFERENCE / "python.md").read_text()
    documented = set(re.findall(r"^### tandem_spec\.(\w+)$", page, re.M))
    errors = {name for name in tandem_spec.__all__ if name.endswith("Error")}
    assert set(tandem_spec.__all__) - documented - errors == {"Chat", "Policy", "Problem", "Recipe", "__version__"}
