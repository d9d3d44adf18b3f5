"""Install profiles: each runs its commands in an environment that has nothing else.

The fast tests make the environment from the installed packages, by links; the slow ones with pip, from the wheel.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.extras import DISTRIBUTION
from support import signing_keys, small_artifacts
from support.paths import ROOT

MAIN = "import sys; from pipeline.cli.main import main; sys.exit(main())"
PROFILES = ("pull", "build", "build-neuron", "serve")
RECIPE = """\
name: tiny
target: {source: "pico://llama?layers=1", dtype: float32}
draft: {derive: {from: target, layers: [0]}}
speculation: {draft_tokens: [1], sampling: [greedy]}
shapes: {batch: [1], prefill: [16], kv: [32]}
"""


class Environment:
    """Runs `tandem` with the packages of one profile, in a folder of its own."""

    def __init__(self, command: list[str], work: Path, **variables: str) -> None:
        self.command = command
        self.work = work
        self.variables = {"PATH": os.environ["PATH"], "HOME": str(work), "TANDEM_CACHE": str(work / "cache")}
        self.variables |= variables

    def tandem(self, *arguments: str | Path, code: int = 0) -> str:
        """Stdout of a command that must end with this code; of one that fails, what it says on stderr."""
        command = [*self.command, *map(str, arguments)]
        done = subprocess.run(command, cwd=self.work, env=self.variables, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout


def closure(requirement: str) -> set[str]:
    """The distributions that a requirement needs, by normalised name, of those that are installed here."""
    found: set[tuple[str, str]] = set()
    queue = [Requirement(requirement)]
    while queue:
        wanted = queue.pop()
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras} - {seen for known, seen in found if known == name}:
            found.add((name, extra))
            needs = [Requirement(text) for text in metadata.requires(name) or ()]
            queue += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


def linked(folder: Path, requirement: str) -> Path:
    """A folder with links to the packages that a requirement needs, for `python -S`."""
    for name in closure(requirement) - {canonicalize_name(DISTRIBUTION)}:
        distribution = metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    for package in ("pipeline", "tandem_spec"):
        (folder / package).symlink_to(ROOT / package)
    return folder


def fresh(tmp_path: Path, profile: str) -> Environment:
    """A profile's environment, made of links."""
    packages, work = tmp_path / "packages", tmp_path / "work"
    packages.mkdir()
    work.mkdir()
    linked(packages, f"{DISTRIBUTION}[{profile}]")
    return Environment([sys.executable, "-S", "-c", MAIN], work, PYTHONPATH=str(packages))


def pulls(here: Environment, tmp_path: Path) -> None:
    """The commands of a machine that pulls: everything but those that build and run."""
    root = small_artifacts.make_validated(here.work / "artifacts/small", tmp_path / "made").root
    private, public = signing_keys.key_pair(tmp_path, "release")
    registry = here.work / "registry"
    here.tandem("publish", root, "--to", registry, "--alias", "prod", "--sign", private)
    pulled = here.work / "pulled"
    here.tandem("pull", f"{registry}/small@prod", pulled, "--require-signature", public)
    here.tandem("verify", pulled)
    assert json.loads(here.tandem("inspect", pulled, "--json"))["name"] == "small"
    assert [entry["aliases"] for entry in json.loads(here.tandem("ls", registry, "--json"))] == [["prod"]]
    here.tandem("diff", root, pulled)
    here.tandem("alias", "list", f"{registry}/small")
    here.tandem("gc", registry, "--dry-run")


def hint(message: str) -> str:
    """The fix of an error without a traceback."""
    assert "Traceback" not in message
    (fix,) = re.findall(r"fix: (.*)", message)
    return fix


def test_pull_profile_runs_its_commands(tmp_path):
    here = fresh(tmp_path, "pull")
    assert not (tmp_path / "packages/torch").exists()
    pulls(here, tmp_path)


def test_pull_profile_names_what_running_needs(tmp_path):
    """`tandem run` and `tandem build` without torch were a traceback, and exit code 1, which means a failed gate."""
    here = fresh(tmp_path, "pull")
    root = small_artifacts.make(here.work / "artifacts/small", tmp_path / "made").root
    manifest = (root / "manifest.json").read_text()
    assert '"inductor"' in manifest
    (here.work / "tiny.yaml").write_text(RECIPE)
    for command in (["run", "small", "--prompt", "a"], ["bench", "small"], ["build", "tiny.yaml"]):
        assert hint(here.tandem(*command, code=3)).endswith("[build]'"), command
    assert hint(here.tandem("serve", "small", code=3)).endswith("[serve]'")
    here.tandem("doctor", "--backend", "inductor", code=3)
    commands = json.loads(here.tandem("doctor", "--json"))["facts"]["commands"]
    assert commands["sign, --require-signature"] == commands["registries s3://"] == "yes"
    assert commands["build, run (inductor)"].endswith("[build]'")


def test_base_install_imports_every_command(tmp_path):
    """`vllm-cache pack` imported the library of the SBOM, which a base install does not have."""
    here = fresh(tmp_path, "")
    code = "from pipeline.cli.main import COMMANDS; print(*(lazy.load().name for lazy in COMMANDS))"
    here.command = [sys.executable, "-S", "-c", code]
    assert "vllm-cache" in here.tandem().split()


def test_base_install_names_all_extras_of_a_command(tmp_path):
    """A pull from S3 with a signature named one extra, and the next one after that was installed."""
    here = fresh(tmp_path, "")
    (here.work / "release.pub").write_text("-----BEGIN PUBLIC KEY-----\n")
    pull = ["pull", "s3://bucket/releases/small@prod", "--require-signature", "release.pub"]
    assert hint(here.tandem(*pull, code=3)).endswith("[s3,sign]'")
    small_artifacts.make_validated(here.work / "artifacts/small", tmp_path / "made")
    publish = ["publish", "small", "--to", "s3://bucket/a", "--to", "hf://org", "--sign", "release.pem"]
    assert hint(here.tandem(*publish, code=3)).endswith("[s3,hub,sign]'")


def test_neuron_profile_brings_no_torch(tmp_path):
    """The SDK brings its own; a build without the SDK says how to install it."""
    names = closure(f"{DISTRIBUTION}[build-neuron]")
    assert "transformers" in names
    assert "torch" not in names
    here = fresh(tmp_path, "build-neuron")
    shutil.copytree(ROOT / "recipes", here.work / "recipes")
    fix = hint(here.tandem("build", "llama-70b-spec", code=3))
    assert "docs/how-to/neuron-host.md" in fix
    assert fix.endswith("[build-neuron]'")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this tree."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(ROOT)]
    subprocess.run(command, check=True)
    (found,) = out.glob("tandem_spec-*.whl")
    return found


def installed(profile: str, wheel: Path, tmp_path: Path) -> Environment:
    """A new environment with a profile, installed by pip."""
    venv, work = tmp_path / "venv", tmp_path / "work"
    work.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    requirement = f"{DISTRIBUTION}[{profile}] @ {wheel.as_uri()}"
    command = [str(venv / "bin/python"), "-m", "pip", "install", "--quiet", requirement]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, env=environ)
    return Environment([str(venv / "bin/tandem")], work)


def remove_others_of_torch(here: Environment, python: Path) -> None:
    """Remove packages of a torch for CUDA, if there are any, by the command that a build prints."""
    code = "from pipeline.extras import of_another_torch; print(*of_another_torch())"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd=here.work)
    found = done.stdout.split()
    if found:
        command = hint(here.tandem("build", "tiny.yaml", "--no-validate", code=3))
        assert command.endswith(f"pip uninstall --yes {' '.join(found)}")
        assert "built for torch with CUDA" in here.tandem("doctor")
        subprocess.run(shlex.split(command), check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("profile", PROFILES)
def test_profile_installed_from_the_wheel_runs_its_commands(profile, wheel, tmp_path):
    here = installed(profile, wheel, tmp_path)
    pulls(here, tmp_path)
    (here.work / "tiny.yaml").write_text(RECIPE)
    shutil.copytree(ROOT / "recipes", here.work / "recipes")
    if profile == "pull":
        assert "tandem-spec[build]" in hint(here.tandem("build", "tiny.yaml", code=3))
    elif profile == "build-neuron":
        here.tandem("recipe", "check", "llama-70b-spec")
        assert "docs/how-to/neuron-host.md" in hint(here.tandem("build", "llama-70b-spec", code=3))
    else:
        if profile == "serve":  # vLLM requires packages that the index has for CUDA only
            remove_others_of_torch(here, tmp_path / "venv/bin/python")
        here.tandem("build", "tiny.yaml", "--no-validate")
        assert json.loads(here.tandem("run", "tiny", "--prompt", "a", "--max-new-tokens", "4", "--json"))["tokens"]
    if profile == "serve":
        assert json.loads(here.tandem("serve", "tiny", "--json"))["environment"]
