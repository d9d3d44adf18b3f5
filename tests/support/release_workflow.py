"""The steps of the workflows of releases, run as the service would run them, and a repository for them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from support.paths import ROOT

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
    """Return the path of a checker."""
    found = shutil.which(name, path=f"{BIN}:{os.environ['PATH']}")
    assert found, f"{name} is not installed: make test-servers installs it"
    return found


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

    def job(self, name: str, workflow: str = "release") -> None:
        """Its steps; once one failed, only those that run always, and the failure is raised at the end."""
        job = yaml.safe_load((self.root / f".github/workflows/{workflow}.yml").read_text())["jobs"][name]
        failure = None
        for step in job["steps"]:
            if "run" not in step or step["name"] == "Install" or (failure and step.get("if") != "always()"):
                continue
            given = {key: self.value(text) for key, text in (job.get("env", {}) | step.get("env", {})).items()}
            command = ["bash", "-eo", "pipefail", "-c", step["run"]]
            try:
                subprocess.run(command, cwd=self.root, check=True, env=self.environ | given)
            except subprocess.CalledProcessError as error:
                failure = failure or error
        if failure:
            raise failure

    def value(self, text: str) -> str:
        """An expression must be one that the test knows; credentials come with the environment, or are empty."""
        match = re.fullmatch(r"\$\{\{ (.*) \}\}", str(text))
        if match is None:
            return str(text)
        given = re.fullmatch(r"(?:secrets|vars)\.(?:CACHE_)?((?:AWS|HF|OCI)_\w+)", match[1])
        return os.environ.get(given[1], "") if given else self.expressions[match[1]]


def expressions_of(repository: Path, registry_url: str, cache_url: str) -> dict[str, str]:
    """What the workflow's expressions are after a push of the last commit."""
    base = "github.event_name == 'pull_request' && github.event.pull_request.base.sha || github.event.before"
    return {
        base: git(repository, "rev-parse", "HEAD~1"), "github.sha": git(repository, "rev-parse", "HEAD"),
        "matrix.recipe": "tiny", "vars.TANDEM_REGISTRY": registry_url, "vars.TANDEM_ALIAS": "prod",
        "vars.TANDEM_REMOTE_CACHE": cache_url,
        "vars.TANDEM_REMOTE_CACHE != '' && '1' || '0'": "1" if cache_url else "0",
        "github.token": "t", "github.repository": "org/repo", "github.event.pull_request.number": "7",
    }  # fmt: skip


def make_repository(tmp_path: Path) -> Path:
    """A repository with this package, a recipe, and a commit that changes it and one for a chip."""
    root = tmp_path / "repository"
    for name in ("pipeline", "scripts", ".github"):
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
    chip = TINY.replace("name: tiny", "name: chip").replace("float32", "bfloat16")
    (root / "recipes/chip.yaml").write_text(chip + "backend: {name: neuron, target: trn2}\n")
    environ = os.environ | {"PYTHONPATH": str(root), "TANDEM_CACHE": str(tmp_path / "cache")}
    subprocess.run([str(BIN / "tandem"), "recipe", "lock", "tiny"], cwd=root, env=environ, check=True)
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "two")
    return root
