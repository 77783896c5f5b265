"""What Schemathesis can't know of the service under test: its jobs and inputs, from the environment."""

from __future__ import annotations

import os
import re
from typing import Any

import schemathesis

LASTING, VICTIMS = (os.environ[name].split(",") for name in ("FUZZ_JOBS", "FUZZ_VICTIMS"))
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
INPUTS = {"zip": "incoming/one.zip", "folder": "pages"}


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: dict[str, Any]) -> None:
    """Jobs, inputs and models that are there, in place of well-formed ones that are not."""
    named = case.path_parameters or {}
    job = str(named.get("id"))
    if UUID.fullmatch(job) and job not in (*LASTING, *VICTIMS) and job[0] != "0":
        pool = VICTIMS if case.method.upper() in ("DELETE", "POST") else LASTING
        named["id"] = pool[int(job[:8], 16) % len(pool)]
    if isinstance(case.body, dict) and case.media_type == "multipart/form-data":
        # Where name="x\" ends depends on who reads it: forms.py refuses it, which no schema tells.
        for name in [name for name in case.body if name.endswith("\\")]:
            del case.body[name]
    if isinstance(case.body, dict):
        _fill_in(case.body.get("input"), "type", "path")
        _fill_in(case.body, "inputType", "inputPath")
        params = case.body.get("params")
        # 2.0 is an integer to JSON Schema, and none to this service (see the README).
        for values in filter(lambda one: isinstance(one, dict), (case.body, params)):
            values |= {key: int(n) for key, n in values.items() if type(n) is float and n.is_integer()}
        if isinstance(params, dict):
            if isinstance(params.get("model"), str):
                params["model"] = "realesr-animevideov3"


def _fill_in(source: Any, kind: str, path: str) -> None:
    if not isinstance(source, dict) or source.get(kind) not in (*INPUTS,):
        return
    if isinstance(source.get(path), str) and re.fullmatch(r"[^\x00-\x1f\x7f-\x9f]+", source[path]):
        source[path] = INPUTS[source[kind]]
