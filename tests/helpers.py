"""What several test files need."""

from __future__ import annotations

import os

import pytest


def require(present: object, reason: str) -> None:
    """Skip a test where what it needs is missing; in CI, where all is there, fail it."""
    if present:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
