"""The token server of an OCI registry: one user, `tests` with the password `secret`, or the refresh token of that user.

Written after distribution.github.io/distribution/spec/auth/token and /auth/jwt.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

PASSWORD = "Basic " + base64.b64encode(b"tests:secret").decode()
REFRESH = "refresh-secret"
AUTH = """\
auth:
  token: {{realm: "{realm}", service: tests, issuer: tests, rootcertbundle: {certificate}}}
"""


@dataclass
class Tokens:
    """What the registry is told, and what was asked for."""

    auth: str = ""
    lives_s: int = 300
    scopes: list[str] = field(default_factory=list)
    refreshed: int = 0


@contextmanager
def running(folder: Path) -> Iterator[Tokens]:
    """Start and stop."""
    key = rsa.generate_private_key(65537, 2048)
    certificate = _certificate(key)
    path = folder / "token.crt"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    chain = [base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()]
    tokens = Tokens()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = parse_qs(urlsplit(self.path).query)
            self.answer(asked, self.headers.get("Authorization") == PASSWORD)

        def do_POST(self) -> None:
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            tokens.refreshed += 1
            self.answer(asked, asked.get("refresh_token") == [REFRESH])

        def answer(self, asked: dict[str, list[str]], known: bool) -> None:
            if not known:
                self.send_response(401)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            tokens.scopes += asked.get("scope", [])
            data = json.dumps({"token": _token(key, chain, asked.get("scope", []), tokens.lives_s)}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    tokens.auth = AUTH.format(realm=f"http://127.0.0.1:{server.server_port}/token", certificate=path)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield tokens
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _certificate(key: rsa.RSAPrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - dt.timedelta(days=1))
    return builder.not_valid_after(now + dt.timedelta(days=1)).sign(key, hashes.SHA256())


def _token(key: rsa.RSAPrivateKey, chain: list[str], scopes: list[str], lives_s: int) -> str:
    now = int(time.time())
    access = [
        dict(zip(("type", "name", "actions"), (kind, name, actions.split(",")), strict=True))
        for kind, name, actions in (scope.split(":") for scope in scopes)
    ]
    claims = {
        "iss": "tests", "sub": "tests", "aud": "tests", "exp": now + lives_s, "nbf": now - 600, "iat": now - 600,
        "jti": uuid.uuid4().hex, "access": access,
    }  # fmt: skip
    head = _encoded({"typ": "JWT", "alg": "RS256", "x5c": chain})
    text = f"{head}.{_encoded(claims)}"
    signature = key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256())
    return f"{text}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


def _encoded(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")
