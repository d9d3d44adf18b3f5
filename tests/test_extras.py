"""Missing extras: all of a command's are named at once, and the fix installs them from where Tandem came from."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import extras
from pipeline.errors import HostError
from support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def installed_from(monkeypatch) -> Callable[[dict | None], None]:
    """Sets the record of where the distribution came from, which pip writes for what is not from an index."""

    def set_origin(origin: dict | None) -> None:
        text = None if origin is None else json.dumps(origin)
        distribution = SimpleNamespace(read_text=lambda name: text if name == "direct_url.json" else None)
        monkeypatch.setattr(metadata, "distribution", {extras.DISTRIBUTION: distribution}.__getitem__)

    return set_origin


@pytest.fixture
def without(monkeypatch) -> Callable[..., None]:
    """Makes modules absent."""

    def remove(*names: str) -> None:
        monkeypatch.setattr(extras, "find_spec", lambda name: None if name in names else object())

    return remove


def words(command: str) -> list[str]:
    """The arguments of `pip install` in a command that a person copies."""
    found = shlex.split(command)
    return found[found.index("install") + 1 :]


def test_install_command_of_vllm_leaves_an_environment_with_torch_alone(installed_from, without, tmp_path):
    """`pip install -e '.[vllm]'` in the environment of a build replaced its torch."""
    installed_from(None)
    without("vllm")
    command = extras.install_command("vllm", "s3")
    assert command == "python3 -m venv .venv-serve && .venv-serve/bin/pip install 'tandem-spec[serve]'"
    without("vllm", "torch")
    assert words(extras.install_command("vllm")) == ["tandem-spec[serve]"]
    assert ".venv-serve" not in extras.install_command("vllm")


@pytest.mark.parametrize("editable", [True, False])
def test_install_command_of_a_clone_names_the_clone(installed_from, tmp_path, editable):
    """The hint was `pip install 'tandem[s3]'`, which installs another project."""
    clone = tmp_path / "my clone"
    clone.mkdir()
    installed_from({"url": clone.as_uri(), "dir_info": {"editable": True} if editable else {}})
    assert words(extras.install_command("s3")) == [*(["-e"] if editable else []), f"{clone}[s3]"]


def test_install_command_of_an_index_names_the_distribution(installed_from):
    installed_from(None)
    assert words(extras.install_command("s3", "sign")) == ["tandem-spec[s3,sign]"]


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        (("inductor",), "build"),
        (("s3", "inductor", "sign"), "build"),
        (("neuron", "hub"), "build-neuron,hub"),
        (("vllm", "oci"), "serve"),
        (("ray", "inductor"), "build,ray"),
        (("sign",), "sign"),
    ],
)
def test_install_command_names_profiles(installed_from, without, missing, named):
    """`doctor` named the extras `inductor` and `vllm`, the README the profiles `build` and `serve`."""
    installed_from(None)
    without("torch", "vllm")
    assert words(extras.install_command(*missing)) == [f"tandem-spec[{named}]"]


@pytest.mark.parametrize("extra", extras.PROFILES)
def test_profiles_have_the_extras_that_hints_leave_out(extra):
    profile, others = extras.PROFILES[extra]
    groups = PROJECT["optional-dependencies"]
    (of_profile,) = groups[profile]
    nested = [name for group in groups[extra] for name in re.findall(r"tandem-spec\[(.*)\]", group)]
    assert {extra} | others == {*of_profile.partition("[")[2].removesuffix("]").split(","), *nested}


def test_install_command_of_a_wheel_file_names_the_file(installed_from, tmp_path):
    wheel = tmp_path / "tandem_spec-0.1.0-py3-none-any.whl"
    wheel.touch()
    installed_from({"url": wheel.as_uri(), "archive_info": {}})
    assert words(extras.install_command("sign")) == [f"tandem-spec[sign] @ {wheel.as_uri()}"]


def test_install_command_of_a_commit_names_the_commit(installed_from):
    vcs = {"vcs": "git", "commit_id": "a" * 40}
    installed_from({"url": "https://example.com/tandem.git", "vcs_info": vcs})
    (requirement,) = words(extras.install_command("hub"))
    assert requirement == f"tandem-spec[hub] @ git+https://example.com/tandem.git@{'a' * 40}"


def test_install_command_of_a_folder_that_is_gone_names_the_distribution(installed_from, tmp_path):
    installed_from({"url": (tmp_path / "gone").as_uri(), "dir_info": {}})
    assert words(extras.install_command("s3")) == ["tandem-spec[s3]"]


def test_install_command_without_an_installation_names_this_clone(monkeypatch):
    monkeypatch.setattr(metadata, "distribution", lambda name: metadata.Distribution.from_name("no-such-thing"))
    assert words(extras.install_command("s3")) == ["-e", f"{ROOT}[s3]"]


def test_install_command_uses_this_environments_pip(monkeypatch, tmp_path):
    """A plain `pip` of another environment would install where Tandem is not."""
    monkeypatch.setattr(extras.shutil, "which", lambda name: str(Path(sys.executable).parent / name))
    assert extras.install_command("s3").startswith("pip install ")
    monkeypatch.setattr(extras.shutil, "which", lambda name: str(tmp_path / name))
    assert extras.install_command("s3").startswith(f"{shlex.quote(sys.executable)} -m pip install ")
    monkeypatch.setattr(extras.PathFinder, "find_spec", lambda name: None)
    assert extras.install_command("s3").startswith(f"uv pip install --python {shlex.quote(sys.executable)} ")


def test_install_command_is_one_that_pip_takes():
    """As printed, by a shell: pip finds this project and every extra in it."""
    command = f"{extras.install_command('s3', 'sign')} --dry-run --no-deps --no-index --no-build-isolation"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "does not provide the extra" not in done.stderr
    assert extras.DISTRIBUTION in done.stdout.replace("_", "-")


def test_require_names_all_packages_at_once(without):
    """`publish --sign --to s3://` named one package, and after that was installed the next one."""
    without("obstore", "boto3", "model_signing", "OpenSSL")
    with pytest.raises(HostError) as caught:
        extras.require(["s3", "hub", "sign", "s3"], "tandem publish")
    assert (caught.value.where, caught.value.what) == (
        "tandem publish", "packages not installed: obstore, boto3, model_signing, OpenSSL",
    )  # fmt: skip
    assert words(caught.value.fix)[-1].endswith("[s3,sign]")


def test_require_of_installed_extras_passes(without):
    without()
    extras.require(extras.MODULES, "here")


def test_missing_package_names_the_extra(without):
    without("torch", "tokenizers")
    error = extras.missing_package(ModuleNotFoundError("no", name="torch.nn"))
    assert error is not None
    assert error.what == "packages not installed: torch, tokenizers"
    assert words(error.fix)[-1].endswith("[build]")


def test_missing_package_of_no_extra_is_a_bug_of_ours():
    assert extras.missing_package(ModuleNotFoundError("no", name="pipeline.gone")) is None


@pytest.mark.parametrize("extra", extras.MODULES)
def test_modules_belong_to_requirements_of_the_extra(extra):
    distributions = metadata.packages_distributions()
    required = {re.split(r"[<>=\[ ]", text)[0] for text in PROJECT["optional-dependencies"][extra]}
    for module in extras.MODULES[extra]:
        names = distributions.get(module) or [f"{module}-cpu", module]  # without the extra, by the module's name
        assert {name.lower().replace("_", "-") for name in names} & required, module


def test_project_has_the_name_of_the_hints():
    """`tandem` on PyPI is another project; the command keeps its name."""
    assert PROJECT["name"] == extras.DISTRIBUTION
    assert PROJECT["scripts"] == {"tandem": "pipeline.cli.main:main"}
    own = {name for group in PROJECT["optional-dependencies"].values() for name in group if name.startswith("tandem")}
    assert {name.partition("[")[0] for name in own} == {extras.DISTRIBUTION}


def test_a_message_about_packages_leaves_setuptools_importable():
    """To look for pip ended every later compilation in the process: torch imports setuptools then."""
    code = (
        "import os; os.environ['PATH'] = ''; from pipeline import extras; "
        "print(extras.install_command('s3')); import setuptools"
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "pip install" in ran.stdout


def test_packages_of_another_torch_are_named(tmp_path, monkeypatch):
    """`tandem serve` ended in a traceback, after `tandem doctor` had found no problem."""
    for name in ("torch", "torchvision", "torchaudio"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "torch/lib").mkdir()
    (tmp_path / "torchvision/_C.so").write_bytes(b"\x7fELF needs libtorch_cuda.so\0")
    (tmp_path / "torchaudio/_audio.so").write_bytes(b"\x7fELF needs libtorch_cpu.so\0")
    monkeypatch.setattr(extras, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    assert extras.of_another_torch() == ["torchvision"]
    (tmp_path / "torch/lib/libtorch_cuda.so").touch()
    assert extras.of_another_torch() == []
