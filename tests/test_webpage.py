"""What the web page and /docs are made of; how they behave is in test_browser.py."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest

from web import openapi, routes, webpage

HOST = "127.0.0.1:8001"


def policy_of(answer):
    return dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))


@pytest.mark.parametrize("page", [webpage.index, lambda host: webpage.docs(routes.ROUTES, host)])
def test_nothing_runs_inline_but_what_the_policy_has_the_hash_of(page):
    answer = page(HOST)
    text, policy = answer.body.decode(), policy_of(answer)
    for tag, kind in (("script", "script-src"), ("style", "style-src")):
        for part in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy[kind]
        assert "unsafe" not in policy[kind] and "*" not in policy[kind] and ":" not in policy[kind]
    assert policy["default-src"] == "'none'" and policy["connect-src"] == f"'self' ws://{HOST} wss://{HOST}"
    assert not re.search(r"\sstyle=|\son\w+=\"", text)


def test_the_page_names_no_other_host():
    hosts = set(re.findall(r"\bhttps?://[^/'\"]+", webpage.index(HOST).body.decode()))
    assert hosts <= {"http://www.w3.org"}  # the name of a namespace


def test_docs_without_the_wheel_are_a_table_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(webpage, "WHEEL", "there_is_no_such_package")
    text = webpage.docs(routes.ROUTES, HOST).body.decode()
    assert "pip install flask-swagger-ui" in text and "/jobs/{id}/resume" in text
    assert not webpage.can_try_out()


def test_the_assets_are_those_that_the_interface_names():
    assert openapi.VARIABLES["file"]["enum"] == list(webpage.ASSETS)
    assert all(webpage.asset(name) for name in webpage.ASSETS)
    assert webpage.asset("../__init__.py") is None
