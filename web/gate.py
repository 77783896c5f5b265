"""Who may ask: the Host a request names, the Origin it comes from, the token it has.

Map: Gate (host, origin, token) - CORS headers
Rule: a web page elsewhere can do nothing here, with or without a token; a token is compared in constant time.
Runs in: http-N threads.
"""

from __future__ import annotations

import hashlib
import hmac
import re

import settings
from web.openapi import COOKIE
from web.wire import Answer, Refused, Request

NO_COOKIE = f"{COOKIE}=; HttpOnly; SameSite=Strict; Path=/; Max-Age=0"  # ends a session


class Gate:
    """The checks that each request passes before its route is called."""

    def __init__(self, config: settings.Config) -> None:
        self.config = config

    def check_host(self, request: Request) -> None:
        """On loopback: a foreign name in Host means a web page reached us by rebinding DNS."""
        name = re.sub(r":[0-9]+$", "", request.host).lower()
        bound = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        known = (*settings.LOOPBACK_HOSTS, bound, *map(str.lower, self.config.allowed_hosts))
        if self.config.is_loopback and request.host and not {name, request.host.lower()} & {*known}:
            raise Refused(421, "HOST", f"this service is not {request.host[:100]!a} (REICHAN_ALLOWED_HOSTS)")

    def check_origin(self, request: Request) -> str | None:
        """The request's origin if it is welcome. Raises Refused where a foreign one could do harm."""
        origin = request.headers.one("origin")
        harmful = request.method not in ("GET", "HEAD", "OPTIONS") or request.headers.all("upgrade")
        if origin is None:
            if harmful and request.headers.one("sec-fetch-site") == "cross-site":
                raise Refused(403, "ORIGIN", "a request from another web site")
            return None
        own = {f"http://{request.host}", f"https://{request.host}"}
        if origin in own or origin in settings.TAURI_ORIGINS or origin in self.config.allowed_origins:
            return origin
        if harmful:
            raise Refused(403, "ORIGIN", f"origin {origin[:100]!a} is not welcome (REICHAN_ALLOWED_ORIGINS)")
        return None

    def _session_value(self) -> str:
        """What the cookie holds: proves the token without being it."""
        key = (self.config.token or "").encode()
        return hmac.new(key, b"reichan session", hashlib.sha256).hexdigest()

    def cookie(self) -> str:
        """Set-Cookie of a session, for who has shown the token."""
        return f"{COOKIE}={self._session_value()}; HttpOnly; SameSite=Strict; Path=/"

    def check_token(self, request: Request) -> None:
        """Raises Refused 401 unless the request has the token, or a session's cookie."""
        if not self.config.token:
            return
        given = request.headers.one("authorization") or ""
        scheme, _, token = given.partition(" ")
        if scheme.lower() == "bearer" and _same(token.strip(), self.config.token):
            return
        for part in "; ".join(request.headers.all("cookie")).split(";"):
            name, _, value = part.strip().partition("=")
            if name == COOKIE and _same(value, self._session_value()):
                return
        scheme_wanted = {"WWW-Authenticate": 'Bearer realm="reichan"'}
        raise Refused(401, "TOKEN", "the access token is missing or wrong", scheme_wanted)


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode())


# ---------------------------------------------------------------- CORS headers
def cors(origin: str | None) -> dict[str, str]:
    """Headers of an answer to a welcome origin, or to none."""
    headers = {"Vary": "Origin"}
    if origin:
        headers["Access-Control-Allow-Origin"] = origin
        headers["Access-Control-Allow-Credentials"] = "true"
        headers["Access-Control-Expose-Headers"] = (
            "Accept-Ranges, Content-Disposition, Content-Range, ETag, Location, Repr-Digest, Retry-After"
        )
    return headers

def preflight(origin: str | None) -> Answer:
    """To a browser that asks before it sends (the Fetch standard's CORS-preflight)."""
    headers = {
        "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, DELETE",
        "Access-Control-Allow-Headers": "Authorization, Content-Type, Idempotency-Key, If-Match, "
        "If-None-Match, If-Range, Range, Repr-Digest, X-Reichan-Title, X-Reichan-Volume",
        "Access-Control-Max-Age": "600",
    }
    return Answer(204, headers if origin else {})
