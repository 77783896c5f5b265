"""What browsers are shown: the page at / and the interface at /docs, each with its policy.

Map: the policy - index - docs, the assets it needs
Rule: no other host is named, and only scripts and styles whose hash is in the policy run inline.
Runs in: http-* threads; reads index.html and the assets of the wheel flask-swagger-ui, imports neither.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from web import openapi
from web.openapi import Route
from web.wire import Answer

INDEX = Path(__file__).parent / "index.html"
# Swagger UI, kept current by that wheel; of its Flask part nothing is used.
WHEEL, FOLDER = "flask_swagger_ui", "dist"
ASSETS = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
}
START = """
SwaggerUIBundle({url: "openapi.json", dom_id: "#ui", deepLinking: true, validatorUrl: null,
  displayRequestDuration: true, tryItOutEnabled: true});
if (matchMedia("(prefers-color-scheme: dark)").matches) document.documentElement.classList.add("dark-mode");
"""
DOCS = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Interface - Manga Upscale Service</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
<style>body {{ margin: 0 }} .dark-mode body {{ background: #1c2022 }}</style>
<body>
<main id="ui"></main>
<script src="docs/swagger-ui-bundle.js"></script>
<script>{START}</script>
</html>
"""


def _hashes(text: str, tag: str) -> str:
    """Of the page's inline elements of this kind, as a policy names them."""
    inline = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(part.encode("utf-8")).digest()).decode() for part in inline]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def _answer(text: str, host: str, scripts: str = "", styles: str = "", more: str = "") -> Answer:
    """An HTML page that may talk to this service alone, which the browser calls `host`.

    scripts, styles: further sources of them.
    """
    # Not every browser's 'self' holds for WebSockets; a bare IPv6 address no policy can name.
    lines = f"ws://{host} wss://{host}" if host and "[" not in host else ""
    policy = (
        f"default-src 'none'; script-src {scripts} {_hashes(text, 'script')}; "
        f"style-src {styles} {_hashes(text, 'style')}; img-src 'self' data: blob:; "
        f"connect-src 'self' {lines}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'{more}"
    )
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": re.sub(r" +(?=[ ;])", "", policy),
        "Referrer-Policy": "no-referrer",
    }
    return Answer(200, headers, text.encode("utf-8"))


def index(host: str) -> Answer:
    """The page for people. host: as in the request, checked by wire."""
    return _answer(INDEX.read_text(encoding="utf-8"), host, more="; require-trusted-types-for 'script'")


def can_try_out() -> bool:
    """Whether /docs has what it needs for more than a table."""
    return all(asset(name) for name in ASSETS)


def docs(routes: Sequence[Route], host: str) -> Answer:
    """The interface: with try-it-out where the wheel is installed, else as a table that says so."""
    if can_try_out():
        return _answer(DOCS, host, scripts="'self'", styles="'self'")
    return _answer(openapi.page(routes), host)


def asset(name: str) -> Path | None:
    """One of ASSETS on disk; None where it is not there."""
    spec = importlib.util.find_spec(WHEEL)
    places = (spec.submodule_search_locations if spec else None) or ()
    paths = [Path(place, FOLDER, name) for place in places] if name in ASSETS else []
    return next((path for path in paths if path.is_file()), None)
