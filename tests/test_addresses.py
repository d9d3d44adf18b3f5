"""Misspelt addresses, and servers in environment variables: accepted, or named with the right spelling."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import addresses
from pipeline.addresses import endpoint, hub_endpoint, misspelt
from pipeline.cache.remote import Remote
from pipeline.errors import HostError, InputError, TandemError
from pipeline.recipe.schema import Publish, Target
from pipeline.stores.base import open_store, scheme_of
from support.commands import invoke
from support.small_artifacts import make

SCHEMES = ("file", "hf", "s3")

MISSPELT = {
    "s3:/bucket/x": "write s3://bucket/x",
    "s3:bucket": "write s3://bucket",
    "s3//bucket/x": "write s3://bucket/x",
    "s3:///bucket": None,
    "S3://bucket": "write s3://bucket",
    "s3;//bucket": "write s3://bucket",
    "s3.//bucket": "write s3://bucket",
    "s3:://bucket": "write s3://bucket",
    "s3 ://bucket": "write s3://bucket",
    "s3:\\\\bucket": "write s3://bucket",
    "s3:": "write s3://bucket/prefix",
    "hf:/org": "write hf://org",
    "hf//org/name": "write hf://org/name",
    "HF://org": "write hf://org",
    "https://huggingface.co/org/name": "write hf://org/name",
    "https://hf.co/org/name/tree/main": "write hf://org/name",
    "file:/abs/x": "without file:",
    "FILE:///abs/x": "without file:",
    "gs:/bucket": "write ./gs:/bucket",
    "host:/export": "write ./host:/export",
    "a:b": "write ./a:b",
    "C:\\registry": "write a path with `/`",
    "C:/registry": "write a path with `/`",
    "\\\\server\\share": "write a path with `/`",
    " s3://bucket": "write 's3://bucket'",
    "s3://bucket\n": "write 's3://bucket'",
    "": "write a folder",
    "  ": "write a folder",
}
"""Address -> part of the fix; None: not misspelt."""


@pytest.mark.parametrize(("address", "fix"), MISSPELT.items())
def test_misspelt(address: str, fix: str | None) -> None:
    """`s3:/bucket/x` was a folder `s3:`."""
    mistake = misspelt(address, SCHEMES)
    assert (mistake is None) == (fix is None)
    assert mistake is None or fix in mistake.fix


@pytest.mark.parametrize(
    "address",
    ["artifacts/registry", "my registry", "./a:b", "a/b:c", "/abs/x", "~/x", "~", "../x", "s3", "s3/x", "é", "a//b",
     "$x;'", "s3://bucket/x", "hf://org/name", "file:///abs", "gs://bucket", "http://host", "my-hf//x"],
)  # fmt: skip
def test_misspelt_accepts_folders_and_other_schemes(address: str) -> None:
    assert misspelt(address, SCHEMES) is None


def test_a_misspelt_registry_is_rejected_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`publish --to s3:/bucket/x` published into a folder `s3:`, with exit code 0."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "pair", tmp_path / "work")
    result = invoke("publish", "pair", "--to", "s3:/bucket/x", "--unvalidated", "--sign", "missing.pem")
    assert result.exit_code == 2
    assert "s3:/bucket/x: misspelt address: s3:/" in result.stderr
    assert "fix: write s3://bucket/x" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pair", "work"]


@pytest.mark.parametrize("url", ["s3:/bucket/x", "hf//org", "S3://bucket"])
def test_every_reader_of_a_registry_rejects_a_misspelt_one(url: str) -> None:
    for read in (scheme_of, open_store, Remote):
        with pytest.raises(InputError, match="misspelt address"):
            read(url)
    assert invoke("ls", url).exit_code == invoke("gc", url).exit_code == 2
    assert invoke("pull", f"{url}/pair@latest").exit_code == 2
    assert Publish(to=url).to == url  # the recipe's own check is `tandem recipe check`


def test_a_shared_cache_on_a_hub_is_rejected_before_any_work() -> None:
    with pytest.raises(HostError, match="a Hub cannot hold a cache"):
        Remote("hf://org/name")


@pytest.mark.parametrize(("source", "fix"), [("hf:/org/name", "hf://org/name"), ("HF://org/name", "hf://org/name"),
                                             ("https://huggingface.co/org/name", "hf://org/name"),
                                             ("pico:family", "pico://family"), ("C:\\model", "with `/`")])  # fmt: skip
def test_a_misspelt_source_is_rejected_with_the_recipe(source: str, fix: str) -> None:
    """`hf:/org/name` was a folder that does not exist."""
    with pytest.raises(ValueError, match=fix):
        Target(source=source)


def test_an_http_registry_names_the_variables_of_servers() -> None:
    with pytest.raises(HostError, match="unsupported kind of registry: http://") as caught:
        scheme_of("http://localhost:9000/bucket")
    assert "AWS_ENDPOINT_URL" in caught.value.fix


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*addresses.PROXIES, "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize(
    ("value", "url"),
    [("", ""), ("  ", ""), ("http://host", "http://host"), ("https://host/", "https://host"), (" http://h:1/ ", "http://h:1"),
     ("http://host/path/", "http://host/path"), ("HTTP://host", "HTTP://host"), ("http://[::1]:9000", "http://[::1]:9000")],
)  # fmt: skip
def test_endpoint(value: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", value)
    assert endpoint("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") == url


FAULTS = {
    "localhost:9000": ("no scheme", "set X=http://localhost:9000"),
    "127.0.0.1:9000/": ("no scheme", "set X=http://127.0.0.1:9000"),
    "minio:9000": ("no scheme", "set X=http://minio:9000"),
    "s3.example.com": ("no scheme", "set X=https://s3.example.com"),
    "//host.example.com": ("no scheme", "set X=https://host.example.com"),
    "https:/s3.example.com": ("no scheme", "set X=https://s3.example.com"),
    "ftp://host": ("expected a URL with http://, https://", "for example X=http://localhost:9000"),
    "http://": ("names no host", "for example"),
    "http://:9000": ("names no host", "for example"),
    "http://h..x": ("names no host", "for example"),
    "http://host:port": ("port is malformed", "for example"),
    "http://host:99999": ("port is malformed", "for example"),
    "http://[::1": ("port is malformed", "for example"),
    "http://a b": ("spaces", "for example"),
    "http://{host}": ("spaces", "for example"),
    "http://host?x=1": ("query", "for example"),
    "http://host#x": ("query", "for example"),
    "http://user:secret@host": ("user name or password", "for example"),
}


@pytest.mark.parametrize(("value", "expected"), FAULTS.items())
def test_endpoint_names_the_fault(value: str, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a scheme, the client of S3 ended with a PanicException."""
    monkeypatch.setenv("X", value)
    with pytest.raises(HostError) as caught:
        endpoint("X")
    assert caught.value.where == "X"
    assert expected[0] in caught.value.what
    assert expected[1] in caught.value.fix
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
def test_s3_and_hub_check_their_endpoint_when_they_are_opened(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setenv(variable, "localhost:9000")
    with pytest.raises(HostError, match=f"{variable}: found 'localhost:9000', which has no scheme"):
        open_store("s3://bucket/prefix")
    monkeypatch.setenv("HF_ENDPOINT", "localhost:9000")
    with pytest.raises(HostError, match="HF_ENDPOINT: found 'localhost:9000', which has no scheme"):
        open_store("hf://org")


@pytest.mark.parametrize("value", ["", " "])
def test_empty_variables_are_as_absent_ones(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty AWS_ENDPOINT_URL was the URL of the server: `relative URL without a base`."""
    obstore = pytest.importorskip("obstore")
    from datetime import timedelta

    from pipeline.stores.s3 import open_s3

    for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    store = open_s3("bucket/prefix").bucket.store
    assert obstore.sign(store, "GET", "x", timedelta(minutes=1)).startswith(
        "https://s3.us-east-1.amazonaws.com/bucket/x?"
    )
    monkeypatch.setenv("HF_ENDPOINT", value)
    assert hub_endpoint() == "https://huggingface.co"


@pytest.mark.parametrize("name", ["HTTP_PROXY", "https_proxy", "ALL_PROXY"])
@pytest.mark.parametrize(
    ("value", "what"),
    [("::::", "port is malformed"), ("http://user:secret@host:port", "port is malformed"), ("http://", "names no host"),
     ("ftp://user:secret@host", "expected a URL with http://"), ("http://a b", "spaces")],
)  # fmt: skip
def test_a_malformed_proxy_is_named(name: str, value: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended with a traceback of the client."""
    monkeypatch.setenv(name, value)
    for read in (hub_endpoint, lambda: endpoint("AWS_ENDPOINT_URL")):
        with pytest.raises(HostError, match=what) as caught:
            read()
        assert caught.value.where == name
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("value", ["proxy:3128", "http://user:secret@proxy:3128", "https://proxy", " "])
def test_a_proxy_may_lack_a_scheme_and_have_a_password(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", value)
    assert hub_endpoint() == "https://huggingface.co"


@pytest.mark.parametrize(
    ("value", "what"),
    [("socks4://h:1", "expected http:// or socks5://"), ("socks5h://h:1", "needs the package socksio")],
)
def test_a_socks_proxy_of_the_hub_is_named(value: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended with an ImportError or a ValueError."""
    monkeypatch.setattr(addresses, "SOCKS_PACKAGES", ("socksio",))
    monkeypatch.setattr(addresses, "find_spec", lambda _: None)
    monkeypatch.setenv("ALL_PROXY", value)
    with pytest.raises(TandemError, match=what):
        hub_endpoint()
