"""What is deployed: the workflow's own steps on real servers, and manifests, unit and images by their checkers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small_artifacts as small
import yaml

from pipeline import registry
from pipeline.changed import changed_recipes
from pipeline.publish import publish

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / ".github/workflows/release.yml"
SLOW = ROOT / ".github/workflows/slow.yml"
BIN = Path(sys.executable).parent
TINY = """
name: tiny
target: {source: "pico://qwen3?layers=2", dtype: float32}
draft: {derive: {from: target, layers: [0]}}
speculation: {draft_tokens: [2], sampling: [greedy]}
shapes: {batch: [2], prefill: [16], kv: [48]}
validate: {prompts: prompts.jsonl, max_new_tokens: 10, gates: {tokens_per_step: 1.0}}
"""


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{BIN}:{os.environ['PATH']}")
    assert found, f"{name} is not installed: make test-servers installs it"
    return found


@pytest.mark.server
@pytest.mark.parametrize("workflow", [WORKFLOW, SLOW], ids=lambda path: path.stem)
def test_workflow_by_actionlint(workflow):
    done = subprocess.run([tool("actionlint"), str(workflow)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.server
@pytest.mark.parametrize("workflow", [WORKFLOW, SLOW], ids=lambda path: path.stem)
def test_workflow_by_its_schema(workflow):
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", str(workflow)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_slow_lanes_are_targets_of_the_makefile():
    data = yaml.safe_load(SLOW.read_text())
    lanes = data["jobs"]["lane"]["strategy"]["matrix"]["lane"]
    targets = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
    assert set(lanes) == {target for target in targets if target.startswith("test-")}
    assert data["jobs"]["lane"]["permissions"] == {"contents": "read"}
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", one) for one in re.findall(r"uses: (\S+)", SLOW.read_text()))


def test_workflow_pins_actions_and_asks_for_little():
    """Every action by commit; no permission at the top; code of pull requests runs without secrets or identity."""
    text = WORKFLOW.read_text()
    uses = re.findall(r"uses: (\S+)", text.split("name: release\n", 1)[1])
    assert uses
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", one) for one in uses)
    data = yaml.safe_load(text)
    assert data["permissions"] == {}
    rights = {name: job["permissions"] for name, job in data["jobs"].items()}
    assert rights == {
        "changed": {"contents": "read"},
        "check": {"contents": "read"},
        "comment": {"pull-requests": "write"},
        "publish": {"contents": "read", "id-token": "write"},
    }
    assert "secrets." not in json.dumps(data["jobs"]["check"])
    runs = [step.get("run", "") for job in data["jobs"].values() for step in job["steps"]]
    assert not any("${{" in run for run in runs)  # expressions in a shell are how branch names become commands


@pytest.mark.server
def test_kubernetes_manifests():
    command = [tool("kubernetes-validate"), "--strict", *map(str, (ROOT / "deploy/kubernetes").glob("*.yaml"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kubernetes_arguments_are_options():
    """The init container's command line is one that `tandem pull` takes; the server cannot write the volume."""
    from pipeline.cli import main

    documents = list(yaml.safe_load_all((ROOT / "deploy/kubernetes/serve.yaml").read_text()))
    pod = next(one for one in documents if one["kind"] == "Deployment")["spec"]["template"]["spec"]
    command, *args = pod["initContainers"][0]["args"]
    main.commands[command].make_context(command, args)
    mounts = {one["name"]: one for one in pod["containers"][0]["volumeMounts"]}
    assert mounts["models"]["readOnly"] is True
    policy = next(one for one in documents if one["kind"] == "ConfigMap")["data"]["policy.yaml"]
    from pipeline.signing import Policy

    Policy.model_validate(yaml.safe_load(policy) | {}, strict=False)


@pytest.mark.server
def test_dockerfile():
    done = subprocess.run(
        [tool("hadolint"), str(ROOT / "deploy/Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.server
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_unit(tmp_path):
    text = (ROOT / "deploy/systemd/tandem-pull@.service").read_text()
    unit = tmp_path / "tandem-pull@.service"
    unit.write_text(text.replace("/opt/tandem/bin/tandem", "/bin/true"))  # what it starts is not installed here
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.server
def test_pull_without_torch(tmp_path, url):
    """As in the pull image: an import of torch, numpy or transformers would end this."""
    made = small.make_validated(tmp_path / "made", tmp_path / "work").root
    publish(made, url, ["latest"])
    code = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'transformers', 'safetensors'): sys.modules[name] = None\n"
        "from pipeline.cli import main; main()"
    )
    out = tmp_path / "out"
    environ = os.environ | {"PYTHONPATH": str(ROOT), "TANDEM_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code, "pull", f"{url}/small@latest", str(out)], env=environ, check=True)
    assert small.digests(out) == small.digests(made)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with this package, a recipe, and a commit that changes it."""
    root = tmp_path / "repository"
    for name in ("pipeline", "ci", ".github"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "recipes").mkdir()
    (root / "recipes/tiny.yaml").write_text(TINY)
    (root / "recipes/other.yaml").write_text(TINY.replace("name: tiny", "name: other").replace("prompts.j", "others.j"))
    prompt = json.dumps({"id": "0", "class": "chat", "prompt": "a"}) + "\n"
    for name in ("prompts", "others"):
        (root / f"recipes/{name}.jsonl").write_text(prompt)
    git(root, "init", "-q", "-b", "main")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "one")
    (root / "recipes/prompts.jsonl").write_text(prompt + prompt.replace('"0"', '"1"'))
    environ = os.environ | {"PYTHONPATH": str(root), "TANDEM_CACHE": str(tmp_path / "cache")}
    subprocess.run([str(BIN / "tandem"), "recipe", "lock", "tiny"], cwd=root, env=environ, check=True)
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "two")
    return root


def git(root: Path, *args: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *args]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


class Runner:
    """Runs a job's shell steps as the service would: expressions replaced, one output file, one summary file."""

    def __init__(self, root: Path, expressions: dict[str, str], environ: dict[str, str]) -> None:
        self.root, self.expressions = root, expressions
        self.output, self.summary = root.parent / "output", root.parent / "summary"
        self.output.touch()
        self.summary.touch()
        self.environ = os.environ | environ | {
            "GITHUB_OUTPUT": str(self.output), "GITHUB_STEP_SUMMARY": str(self.summary), "PYTHONPATH": str(root),
            "PATH": f"{root.parent / 'bin'}:{BIN}:{os.environ['PATH']}",
        }  # fmt: skip

    def job(self, name: str) -> None:
        job = yaml.safe_load((self.root / ".github/workflows/release.yml").read_text())["jobs"][name]
        for step in job["steps"]:
            if "run" in step and step["name"] != "Install":
                given = {k: self.value(v) for k, v in (job.get("env", {}) | step.get("env", {})).items()}
                subprocess.run(["bash", "-eo", "pipefail", "-c", step["run"]], cwd=self.root, check=True,
                               env=self.environ | {k: v for k, v in given.items() if v is not None})  # fmt: skip

    def value(self, text: str) -> str | None:
        """An expression must be one that the test knows; secrets come with the environment."""
        match = re.fullmatch(r"\$\{\{ (.*) \}\}", str(text))
        if match is None:
            return str(text)
        return None if match[1].startswith("secrets.") else self.expressions[match[1]]


@pytest.mark.server
def test_workflow_steps(repository, url, s3_url, tmp_path):
    """A push: the changed recipe alone is built from its lock, gated, signed, published; the alias moves. Then the
    comment of a pull request. `gh` is a stand-in that keeps what it was given; the key replaces the job's identity."""
    from signing_keys import key_pair

    from pipeline import signing
    from pipeline.pull import pull

    private, public = key_pair(tmp_path, "release")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gh").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$GH_LOG"; cp comment.md "$GH_LOG.body"\n')
    (tmp_path / "bin/gh").chmod(0o755)
    base = "github.event_name == 'pull_request' && github.event.pull_request.base.sha || github.event.before"
    expressions = {
        base: git(repository, "rev-parse", "HEAD~1"), "github.sha": git(repository, "rev-parse", "HEAD"),
        "matrix.recipe": "tiny", "inputs.registry": url, "inputs.alias": "prod", "inputs.remote-cache": s3_url,
        "inputs.remote-cache != '' && '1' || '0'": "1", "github.token": "t", "github.repository": "org/repo",
        "github.event.pull_request.number": "7",
    }  # fmt: skip
    environ = {"SIGNING_KEY": str(private), "TANDEM_CACHE": str(tmp_path / "cache"), "GH_LOG": str(tmp_path / "gh")}
    runner = Runner(repository, expressions, environ)
    runner.job("changed")
    assert runner.output.read_text() == 'recipes=["tiny"]\n'
    runner.job("publish")
    assert "| passed | yes |" in runner.summary.read_text()
    released = registry.list_releases(url)
    assert [(one.name, one.aliases) for one in released] == [("tiny", ("prod",))]
    out = pull(f"{url}/tiny@prod", tmp_path / "out", cache=tmp_path / "c", policy=signing.require(str(public)))
    assert (out / "graphs").is_dir()
    runner.job("check")
    runner.job("comment")
    assert (tmp_path / "gh").read_text().split() == [
        "pr", "comment", "7", "--body-file", "comment.md", "--edit-last", "--create-if-none",
    ]  # fmt: skip
    assert "| passed | yes |" in (tmp_path / "gh.body").read_text()


@pytest.mark.server
def test_release_stops_at_a_failed_gate(repository, s3_url, tmp_path):
    """The alias stays where it was, and nothing is published."""
    path = repository / "recipes/tiny.yaml"
    path.write_text(path.read_text().replace("tokens_per_step: 1.0", "tokens_per_step: 2.9"))
    environ = os.environ | {"PYTHONPATH": str(repository), "TANDEM_CACHE": str(tmp_path / "cache"), "REGISTRY": s3_url}
    environ |= {"PATH": f"{BIN}:{os.environ['PATH']}", "SIGNING_KEY": "unused", "ALIAS": "prod"}
    subprocess.run([str(BIN / "tandem"), "recipe", "lock", "tiny"], cwd=repository, env=environ, check=True)
    steps = "ci/release.sh build tiny && ci/release.sh publish tiny"
    done = subprocess.run(
        ["bash", "-c", steps], cwd=repository, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "gate failed" in done.stderr
    assert registry.list_releases(s3_url) == []


def test_changed_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, more in (("one", ""), ("two", "base: bases/b.yaml\n"), ("bad", "nonsense: [")):
        path = tmp_path / "recipes" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(more + TINY.replace("name: tiny", f"name: {name}").replace("prompts.jsonl", f"{name}.jsonl"))
    (tmp_path / "recipes/bases").mkdir()
    (tmp_path / "recipes/bases/b.yaml").write_text("parallel: {tensor: 1}\n")
    cases = {
        "recipes/one.yaml": ["bad", "one"], "recipes/one.lock": ["bad", "one"], "recipes/bases/b.yaml": ["bad", "two"],
        "recipes/two.jsonl": ["bad", "two"], "README.md": [], "recipes/bad.yaml": ["bad"], "pipeline/recipe.py": [],
    }  # fmt: skip
    assert {path: changed_recipes([path]) for path in cases} == cases
