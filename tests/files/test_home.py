"""Paths that start with `~`, and accounts without a home."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from pipeline.cache.local import default_root
from pipeline.errors import InputError
from pipeline.files.home import expanded, has_home
from pipeline.stores.folder import open_folder
from support.commands import invoke


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs any number as its account: no HOME, and no entry in the accounts."""

    def unknown(_: object) -> None:
        raise KeyError("uid not found")

    for name in ("HOME", "USER", "LOGNAME", "USERNAME", "LNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)


@pytest.mark.parametrize(
    ("setting", "path"),
    [("~/c", "HOME/c"), ("~", "HOME"), ("c/d", "CWD/c/d"), ("./a b", "CWD/a b"), ("/abs", "/abs"),
     ("", "CWD/artifacts/cache"), ("  ", "CWD/artifacts/cache")],
)  # fmt: skip
def test_default_root(setting: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~/cache` was a folder `~`, and an empty TANDEM_CACHE the working directory itself."""
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TANDEM_CACHE", setting)
    expected = path.replace("HOME", str(tmp_path / "home")).replace("CWD", str(tmp_path))
    assert str(default_root()) == expected


@pytest.mark.usefixtures("homeless")
def test_expanded_without_a_home_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended with `RuntimeError: Could not determine home directory`."""
    assert not has_home()
    monkeypatch.setenv("TANDEM_CACHE", "~/cache")
    for read in (default_root, lambda: open_folder("~/registry"), lambda: expanded("~/x", "TANDEM_CACHE")):
        with pytest.raises(InputError, match="no home folder is known for '~'"):
            read()
    result = invoke("completion", "bash", "--install")
    assert result.exit_code == 2
    assert "HOME: no home folder" in result.stderr


@pytest.mark.usefixtures("homeless")
def test_s3_opens_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    from pipeline.stores.s3 import open_s3

    for name in ("AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert open_s3("bucket/prefix").bucket.where == "s3://bucket/prefix"


def test_expanded_of_an_unknown_account() -> None:
    with pytest.raises(InputError, match="no home folder is known for '~nobody-of-this-name'"):
        expanded("~nobody-of-this-name/x")
