"""What the project promises to those who work on it: workflows, targets of the Makefile, owners, the package's tag.

The files are read as text here; `test_deploy.py` runs their checkers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

import pipeline
from pipeline.cache.local import KINDS
from support.paths import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
USES = re.compile(r"uses: (?P<action>[\w./-]+)@(?P<commit>\S+)(?: # (?P<version>\S+))?")


def jobs(name: str) -> dict[str, dict]:
    return yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())["jobs"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_grants_and_limits(workflow):
    """No permission at the top, then each job names its own, and its time; no expression becomes a shell's text."""
    data = yaml.safe_load(workflow.read_text())
    assert data["permissions"] == {}
    assert "cancel-in-progress" in data["concurrency"]
    for job in data["jobs"].values():
        assert job["permissions"]
        assert job["timeout-minutes"] <= 360
        assert not any("${{" in step.get("run", "") for step in job["steps"])


def test_actions_are_pinned_by_one_commit_each():
    """A tag can be moved; a comment says which version the commit is, and Dependabot renews both."""
    pins: dict[str, set[tuple[str, str]]] = {}
    for workflow in WORKFLOWS:
        for match in USES.finditer(workflow.read_text()):
            assert re.fullmatch("[0-9a-f]{40}", match["commit"]), match[0]
            assert re.fullmatch(r"v\d+\.\d+\.\d+", match["version"] or ""), match[0]
            pins.setdefault(match["action"], set()).add((match["commit"], match["version"]))
    assert len(pins) >= 6
    assert {action: len(commits) for action, commits in pins.items()} == dict.fromkeys(pins, 1)


def test_changes_are_checked_without_secrets():
    """Code of a pull request may only read; every supported Python runs the fast tests."""
    data = jobs("ci")
    assert {json.dumps(job["permissions"]) for job in data.values()} == {'{"contents": "read"}'}
    assert "secrets." not in json.dumps(data)
    assert "make --keep-going lint types imports" in json.dumps(data["static"])
    assert "make test" in [step.get("run") for step in data["test"]["steps"]]
    assert "make docs" in [step.get("run") for step in data["docs"]["steps"]]
    versions = data["test"]["strategy"]["matrix"]["python"]
    assert versions == ["3.11", "3.12", "3.13"]
    assert PROJECT["project"]["requires-python"] == f">={versions[0]}"


def test_package_is_published_after_its_checks_and_an_approval():
    data = jobs("package")
    runs = [step["run"] for step in data["build"]["steps"] if "run" in step]
    assert [run.split()[1] for run in runs if "package.sh" in run] == ["tag", "build", "check", "smoke"]
    assert data["attest"]["needs"] == "build"
    assert data["publish"]["needs"] == ["build", "attest"]
    assert data["publish"]["environment"]["name"] == "pypi"
    assert {name: "id-token" in job["permissions"] for name, job in data.items()} == {
        "build": False, "attest": True, "publish": True,
    }  # fmt: skip
    assert "cache" not in json.dumps(data)  # a pull request could have filled it
    assert "secrets." not in json.dumps(data)


@pytest.mark.parametrize(
    ("tag", "code"), [(f"v{pipeline.__version__}", 0), (pipeline.__version__, 3), (f"v{pipeline.__version__}.1", 3)]
)
def test_package_tag_is_the_version(tag, code):
    command = ["bash", str(ROOT / "scripts/ci/package.sh"), "tag", tag]
    done = subprocess.run(
        command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert (f"tag {tag}, pipeline.__version__ {pipeline.__version__}" in done.stderr) == bool(code)


def test_make_lists_every_target():
    """Targets that a person calls are phony and have a line in `make help`, which is what `make` alone shows."""
    environ = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(["make"], cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    assert [line.split()[0] for line in done.stdout.splitlines()] == re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.M)
    assert {line.split()[0] for line in done.stdout.splitlines()} == set(phony.split())


def test_quick_tests_leave_out_what_fast_tests_do():
    """`-m` replaces the expression in pyproject.toml, so the Makefile repeats it after `not compile`."""
    options = PROJECT["tool"]["pytest"]["ini_options"]["addopts"]
    (quick,) = re.findall(r"^QUICK +:= (.*)$", MAKEFILE, re.M)
    assert quick == f"not compile and {options[options.index('-m') + 1]}"


def test_contributing_names_every_lane():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    lanes = re.findall(r"^(test[a-z-]*):", MAKEFILE, re.M)
    assert len(lanes) >= 7
    assert [lane for lane in lanes if f"| `make {lane}` |" not in text] == []


def test_every_room_has_owners():
    """And no line of CODEOWNERS is about a folder that is gone."""
    text = (ROOT / ".github/CODEOWNERS").read_text()
    paths = [line.split()[0] for line in text.splitlines() if line.startswith("/")]
    assert [path for path in paths if not (ROOT / path[1:]).exists()] == []
    rooms = {f"/pipeline/{path.parent.name}/" for path in (ROOT / "pipeline").glob("*/__init__.py")}
    assert rooms <= set(paths)
    assert all(re.search(r" @\S+$", line) for line in text.splitlines() if line and not line.startswith("#"))


@pytest.mark.parametrize("package", ["pipeline", "tandem_spec"])
def test_every_file_of_the_package_is_in_the_wheel(package):
    """`py.typed` says that type checkers may read the annotations; it was missing, so they took all for `Any`."""
    patterns = PROJECT["tool"]["setuptools"]["package-data"][package]
    shipped = {path for pattern in patterns for path in (ROOT / package).glob(pattern)}
    paths = [path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert f"{package}*" in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert ROOT / package / "py.typed" in shipped
    assert {path for path in paths if path.suffix != ".py"} == shipped


def test_artifacts_page_names_every_kind_of_cache_entry():
    """The page said that goldens were in `cache/goldens`, while they and memos were stored under `cache/graphs`."""
    text = (ROOT / "artifacts/README.md").read_text()
    assert [kind for kind in KINDS if f"| `cache/{kind}/` |" not in text] == []


def make_build(venv, *arguments: str, target: str = "build") -> list[str]:
    """The commands that `make build`, or another target, runs in an environment that exists, without `.ready`."""
    (venv / "bin").mkdir(parents=True, exist_ok=True)
    for name in ("python", "tandem", "mypy"):
        (venv / "bin" / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {venv}/calls\n')
        (venv / "bin" / name).chmod(0o755)
    environ = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", target, f"VENV={venv}", "PYTHON=false", "RECIPE=llama-70b-spec", *arguments]
    subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    return (venv / "calls").read_text().splitlines()


INSTALL = "python -m pip install --quiet --editable .[{}]"
BUILD = "tandem build llama-70b-spec"


def test_make_says_before_it_installs_packages(tmp_path):
    """Four minutes of `pip --quiet` printed nothing."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text("#!/bin/sh\nexit 7\n")
    (tmp_path / "bin/python").chmod(0o755)
    done = subprocess.run(["make", "build", f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"installing packages into {tmp_path}: a minute or two, about 1.3 GB of disk\n" in done.stderr


def test_make_build_keeps_the_torch_of_a_neuron_environment(tmp_path):
    """It installed the extra `inductor`, whose torch 2.13 replaced the SDK's 2.9, into an environment made by hand."""
    (tmp_path / "lib/python3.12/site-packages/torch_neuronx").mkdir(parents=True)
    assert make_build(tmp_path) == [INSTALL.format("build-neuron"), BUILD]
    requirements = PROJECT["project"]["optional-dependencies"]
    assert requirements["build-neuron"] == ["tandem-spec[neuron,s3,oci,sign]"]
    assert not any(re.match(r"torch\b(?!-)|tandem-spec\[inductor", need) for need in requirements["neuron"])


def test_make_build_elsewhere_installs_what_compiles_on_a_cpu(tmp_path):
    assert make_build(tmp_path) == [INSTALL.format("build"), BUILD]
    assert (tmp_path / ".ready").exists()


def test_make_installs_what_tests_need_for_tests_alone(tmp_path):
    """`make build` installed bitsandbytes, mypy, scipy and 0.5 GB more, which no build imports."""
    assert make_build(tmp_path, target="types")[0] == INSTALL.format("build,dev")
    assert make_build(tmp_path)[-1:] == [BUILD], "the environment of the tests builds too"
    assert len([line for line in (tmp_path / "calls").read_text().splitlines() if "pip install" in line]) == 1


def test_make_build_installs_the_extras_that_are_named(tmp_path):
    assert make_build(tmp_path, "EXTRAS=neuron s3") == [INSTALL.format("neuron,s3"), BUILD]


@pytest.mark.parametrize("recipe", ["my recipes/a b", "a'b", "a$b", 'a;b"c', "a`b`"])
@pytest.mark.parametrize("by", ["argument", "variable"])
def test_make_build_takes_a_recipe_of_any_path(tmp_path, recipe, by):
    """`RECIPE="my recipes/a b"` was two arguments, and `$b` a variable of make."""
    (tmp_path / "bin").mkdir()
    for name, script in {"python": "true", "tandem": f'printf "%s\\n" "$@" > {tmp_path}/arguments'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environ = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    given = [f"RECIPE={recipe}"] if by == "argument" else []
    if by == "variable":
        environ["RECIPE"] = recipe
    command = ["make", "build", f"VENV={tmp_path}", "PYTHON=false", *given]
    subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    assert (tmp_path / "arguments").read_text().splitlines() == ["build", recipe]
