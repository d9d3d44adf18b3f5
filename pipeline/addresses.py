"""Addresses as people write them: `scheme://rest` with its usual mistakes, and servers in environment variables.

Sends no request and opens nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple
from urllib.parse import urlsplit

from pipeline.errors import HostError, no_string

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
PROXY_SCHEMES = ("http", "https", "socks4", "socks4a", "socks5", "socks5h")
SOCKS_PACKAGES = ("socksio", "socks")
"""Modules by which the Hub's client, of this or an earlier version, connects to SOCKS proxies."""
PLAIN_HTTP = re.compile(r"(localhost|127\.|\[?::1|10\.|192\.168\.|[^.:/]+(:|/|$)|[^/]*:(?!443\b)\d+)", re.IGNORECASE)
"""Hosts that most often have no certificate: this machine, private networks, and ports other than 443."""


SCHEME = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*?)(?P<mark>[^\w./~@-]*:[:/\\]*|[^\w\s/~@-]*//)[/\\]*(?P<rest>.*)", re.ASCII
)
"""A word with a colon, or with another sign and two slashes, before the first slash of an address."""
EXAMPLES = {"s3": "bucket/prefix", "hf": "org/name", "oci": "host/path", "package": "name==version", "pico": "family"}
HUB_URL = "https://huggingface.co"
HUB_PAGE = re.compile(r"https?://(www\.)?(huggingface\.co|hf\.co)/(?P<repo>[^/?#@]+/[^/?#@]+)", re.IGNORECASE)


class Mistake(NamedTuple):
    """What is wrong with an address, and what to write."""

    what: str
    fix: str


def misspelt(address: str, schemes: Sequence[str]) -> Mistake | None:
    """Return the mistake in an address that is nearly `scheme://rest`; None for others, and for paths of folders."""
    no_string(schemes, "schemes", "schemes")
    if not address.strip():
        return Mistake("empty address", "write a folder, or an address like s3://bucket/prefix")
    if address != address.strip() or any(ord(character) < 32 for character in address):
        return Mistake(f"{address!r} has white space around it, or control characters", f"write {address.strip()!r}")
    if re.match(r"\\\\|[A-Za-z]:(\\|/(?!/))", address):
        return Mistake("a path of Windows", "write a path with `/`, for example ./artifacts/registry")
    if "hf" in schemes and (page := HUB_PAGE.match(address)):
        return Mistake("a page of the Hub", f"write hf://{page['repo']}")
    match = SCHEME.fullmatch(address)
    if match is None or address.startswith(tuple(f"{name}://" for name in schemes)):
        return None
    start = match["scheme"] + match["mark"]
    known = next((name for name in schemes if name == match["scheme"].lower().rstrip("+.-")), None)
    if known == "file":
        return Mistake(f"misspelt address: {start}", "write the path of the folder, without file:")
    if known is not None:
        return Mistake(f"misspelt address: {start}", f"write {known}://{match['rest'] or EXAMPLES.get(known, '...')}")
    if ":" in start and not address.startswith(f"{match['scheme']}://"):
        accepted = ", ".join(f"{name}://" for name in schemes)
        what = f"{start} looks like the scheme of an address"
        return Mistake(what, f"write ./{address} for a folder of this name; schemes: {accepted}")
    return None


def endpoint(*variables: str) -> str:
    """Return the URL of a server in the first variable that is set, without a slash at the end; empty if none is set.

    Raises:
        HostError: it, or that of a proxy, is no URL of a server; names the variable, and shows no password.

    """
    _proxies()
    for name in variables:
        if value := (os.environ.get(name) or "").strip():
            _check(name, value, ("http", "https"))
            return value.rstrip("/")
    return ""


def hub_endpoint() -> str:
    """Return the URL of the Hub.

    Raises:
        HostError: as `endpoint`, and for a kind of proxy that the Hub's client does not support.

    """
    for name, scheme in _proxies():
        if scheme.startswith("socks4"):
            raise HostError(
                f"found a proxy {scheme}://, expected http:// or socks5://", where=name, fix=f"change {name}"
            )
        if scheme.startswith("socks") and not any(map(find_spec, SOCKS_PACKAGES)):
            what = f"found a proxy {scheme}://, which needs the package {SOCKS_PACKAGES[0]}"
            raise HostError(what, where=name, fix=f"install {SOCKS_PACKAGES[0]}, or use an http:// proxy")
    return endpoint("HF_ENDPOINT") or HUB_URL


def _proxies() -> list[tuple[str, str]]:
    """Return variables of proxies that are set, with the scheme of each; clients read one without a scheme as http."""
    values = {name: os.environ.get(name, "").strip() for name in (*PROXIES, *(name.lower() for name in PROXIES))}
    urls = {name: value if "://" in value else f"http://{value}" for name, value in values.items() if value}
    for name, url in urls.items():
        _check(name, url, PROXY_SCHEMES, credentials=True)
    return [(name, url.partition("://")[0].lower()) for name, url in urls.items()]


def _check(name: str, value: str, schemes: Sequence[str], *, credentials: bool = False) -> None:
    shown = re.sub(r"//[^/@]*@", "//***@", value)
    example = f"for example {name}={schemes[0]}://localhost:9000"
    scheme, separator, _ = value.partition("://")
    if not separator:
        bare = re.sub(r"^(https?:)?/*", "", shown, flags=re.IGNORECASE)
        likely = "http" if PLAIN_HTTP.match(bare) and not value.lower().startswith("https:") else "https"
        raise HostError(f"found {shown!r}, which has no scheme", where=name, fix=f"set {name}={likely}://{bare}")
    if scheme.lower() not in schemes:
        accepted = ", ".join(f"{each}://" for each in schemes)
        raise HostError(f"found {shown!r}, expected a URL with {accepted}", where=name, fix=example)
    if fault := _fault(value, credentials=credentials):
        raise HostError(f"found {shown!r}, {fault}", where=name, fix=example)


def _fault(url: str, *, credentials: bool) -> str:
    """Return what is wrong with a URL; empty if nothing is."""
    if re.search(r"[\s\\<>\"'{}|^`]", url) or not url.isprintable():
        return "which has spaces or characters that no URL has"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "whose host or port is malformed"
    if not host or ".." in host or host.startswith("."):
        return "which names no host"
    if not credentials and "@" in parts.netloc:
        return "which has a user name or password; credentials have variables of their own"
    return "which has a query or fragment" if parts.query or parts.fragment else ""
