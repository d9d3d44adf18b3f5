"""What tests share: markers and time limits, one thread, and servers of the marker `server`, started once a session."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import guarded_compiler

LONGEST_FIRST = (
    "tests/test_build.py",
    "tests/test_build_again.py",
    "tests/distill/",
    "tests/backends/",
    "tests/validate/",
    "tests/models/",
    "tests/speculation/",
    "tests/serve/",
    "tests/measure/",
    "tests/runtime/",
)
"""Files and folders that take longest start first, so that no worker is left with a long one at the end."""
SAME_WORKER = dict.fromkeys(("tests/test_build_again.py", "tests/validate/test_run.py"), "tests/test_build.py")
"""Files that run in the worker of another file: a session fixture that they use takes more than a minute."""
COMPILING_FIXTURES = frozenset({"built", "elsewhere", "figures", "tiny_built"})
"""Tests that use one of these get the marker `compile`."""
COMPILING_LANES = ("compile", "slow", "server", "vllm", "cuda", "neuron", "xla", "hlo", "ray", "drafts", "chaos")
TIMEOUTS_S = {
    "vllm": 1800,
    "ray": 1800,
    "xla": 3600,
    "hlo": 3600,
    "slow": 3600,
    "compile": 900,
    "drafts": 900,
    "chaos": 1200,
}
"""Time limits of tests with a marker; `timeout` in pyproject.toml holds for all others."""


def pytest_configure(config: pytest.Config) -> None:
    """Guard the compiler, once for all workers, and give each worker one thread before torch is imported."""
    os.environ["TANDEM_TIMESTAMPS"] = "0"  # tests compare whole lines
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    else:
        folder = Path(tempfile.mkdtemp(prefix="tandem-tests-"))
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        guarded_compiler.install(folder)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests whose fixtures compile, give each test the time limit of its marker, and start the longest first."""
    for item in items:
        if isinstance(item, pytest.Function) and COMPILING_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.compile)
        limits = [limit_s for marker, limit_s in TIMEOUTS_S.items() if item.get_closest_marker(marker)]
        if limits and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(max(limits)))
    items.sort(key=_place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A scheduler of whole files, of those in `SAME_WORKER` together."""
    from xdist.scheduler import LoadFileScheduling  # where the plugin runs

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return SAME_WORKER.get(file, file)

    return Scheduling(config, log)


def _place(item: pytest.Item) -> int:
    """A test's rank among the files and folders that start first."""
    return next((i for i, prefix in enumerate(LONGEST_FIRST) if item.nodeid.startswith(prefix)), len(LONGEST_FIRST))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Forbid the compiler to a test of no marker that says it compiles, before its fixtures run.

    `make test` sets PYTHONWARNDEFAULTENCODING for this process; in a test's own processes it would add to stderr.
    """
    os.environ.pop("PYTHONWARNDEFAULTENCODING", None)
    guarded_compiler.allow(any(item.get_closest_marker(lane) for lane in COMPILING_LANES))


@pytest.fixture(scope="module")
def one_thread() -> Iterator:
    """Tiny tensors: more threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The settings of a build of the tiny pair, and the report of it with its gates."""
    from pipeline.build import run  # imports torch, which most files do not need
    from support import tiny_build

    settings = tiny_build.request_in(tmp_path_factory.mktemp("tiny"))
    return settings, run(settings)


@pytest.fixture(scope="session")
def validated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact without a compiler, packaged and validated once."""
    from support import small_artifacts as small

    folder = tmp_path_factory.mktemp("validated")
    return small.make_validated(folder / "out", folder / "work").root


@pytest.fixture
def made(tmp_path: Path, validated: Path) -> Path:
    """A copy to publish or to spoil."""
    return Path(shutil.copytree(validated, tmp_path / "out"))


@pytest.fixture(scope="session")
def s3_server() -> Iterator:
    """A real S3 server with a bucket `tests`."""
    import boto3

    from support import s3_server as servers

    with servers.running() as server:
        key, secret = server.identities["rw"]
        client = boto3.client(
            "s3", endpoint_url=server.endpoint, aws_access_key_id=key, aws_secret_access_key=secret,
            region_name="us-east-1",
        )  # fmt: skip
        client.create_bucket(Bucket="tests")
        yield server


@pytest.fixture(scope="session")
def hub_server() -> Iterator:
    """A Hub that can be written to."""
    from support import git_hub

    with git_hub.running() as hub:
        yield hub


@pytest.fixture
def s3_url(s3_server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty registry of its own in the bucket, and the environment to reach it."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environ().items():
        monkeypatch.setenv(name, value)
    return f"s3://tests/{uuid.uuid4().hex}"


@pytest.fixture
def hub_url(hub_server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An organisation of its own on the Hub, and the environment to reach it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # read at import; this server has LFS only
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_ENDPOINT", hub_server.endpoint)
    monkeypatch.setenv("HF_TOKEN", hub_server.token)
    return f"hf://org-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def distribution() -> Iterator:
    """Docker's own registry, of version 2.8: without a route for referrers."""
    from support import oci_registry

    with oci_registry.running("distribution") as registry:
        yield registry


@pytest.fixture(scope="session")
def crane() -> Iterator:
    """The registry of go-containerregistry, as its command serves it."""
    from support import oci_registry

    with oci_registry.running("crane") as registry:
        yield registry


@pytest.fixture(scope="session")
def referrers() -> Iterator:
    """The same with a route for referrers."""
    from support import oci_registry

    with oci_registry.running("referrers") as registry:
        yield registry


@pytest.fixture
def distribution_url(distribution, monkeypatch: pytest.MonkeyPatch) -> str:
    """A path of its own on Docker's registry."""
    return _oci_url(distribution, monkeypatch)


@pytest.fixture
def crane_url(crane, monkeypatch: pytest.MonkeyPatch) -> str:
    """A path of its own on that registry."""
    return _oci_url(crane, monkeypatch)


@pytest.fixture
def referrers_url(referrers, monkeypatch: pytest.MonkeyPatch) -> str:
    """A path of its own on that registry."""
    return _oci_url(referrers, monkeypatch)


def _oci_url(registry: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    from pipeline.stores import oci_tags

    monkeypatch.setattr(oci_tags, "SETTLE_S", 0.1)
    return f"oci://{registry.host}/org-{uuid.uuid4().hex[:8]}"


@pytest.fixture(params=["s3", "hub", "distribution", "crane", "referrers"])
def url(request: pytest.FixtureRequest) -> str:
    """Each kind of registry that needs a server."""
    found: str = request.getfixturevalue(f"{request.param}_url")
    return found
