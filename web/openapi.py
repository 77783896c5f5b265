"""The interface described: OpenAPI 3.1 and a readable page, from the table that routes requests.

Map: Route - schemas - the document - the page
Rule: nothing is described that is not routed, and nothing routed that is not described.
Runs in: http-* threads; pure functions of the table.
"""

from __future__ import annotations

import functools
import html
import http
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jobs
from engine import screens
from messages import CHOICES, RANGES, Params, camel
from work import submissions, uploads

COOKIE = "reichan_session"  # stands for the token, see POST /session


@dataclass(frozen=True, slots=True)
class Route:
    """One row: how a request is matched, answered and documented."""

    method: str
    path: str  # "{name}" is one segment, "{name...}" the rest of the path
    handler: str  # method of Api
    summary: str
    answers: Mapping[int, str | None]  # status -> schema name or media type
    query: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    headers: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # fields of requests that matter
    body: str | None = None  # schema name or media type
    body_optional: bool = False
    open: bool = False  # needs no token: holds no data

    def match(self, segments: list[str]) -> dict[str, str] | None:
        """Values of the path's variables, if this is its path."""
        parts, values = self.path[1:].split("/"), {}
        if parts[-1].endswith("...}"):
            if len(segments) < len(parts):
                return None
            segments = [*segments[: len(parts) - 1], "/".join(segments[len(parts) - 1 :])]
        if len(segments) != len(parts):
            return None
        for part, segment in zip(parts, segments, strict=True):
            if part.startswith("{"):
                values[part.strip("{.}")] = segment
            elif part != segment:
                return None
        return values


def _object(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


def _nullable(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": [kind, "null"], **more}


TEXT_TYPE, WHOLE, TRUTH = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
HASH = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
NO_CONTROLS = r"[^\x00-\x1f\x7f-\x9f]"
EACH_VOLUME = "with params.split: of each volume; jobId is the first"
NOT_BLANK = rf"^{NO_CONTROLS}*[^\s\x00-\x1f\x7f-\x9f]{NO_CONTROLS}*$"
# Variables of paths: what is sent in another form is no job's and no page's.
VARIABLES: dict[str, dict[str, Any]] = {
    "id": {"type": "string", "format": "uuid"},
    "n": {"type": "integer", "minimum": 1, "maximum": 999_999_999},
    "path": {"type": "string", "minLength": 1},
    "key": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
    "file": {"type": "string", "enum": ["swagger-ui-bundle.js", "swagger-ui.css"]},
}
# Of a volume's time and size, and what became of it; null where nothing like it was measured here yet.
PREDICTION = _object(
    {
        "minutes": {"type": "number"},
        "megabytes": {"type": "number"},
        "basis": {"type": "string", "enum": ["volumes", "preview"]},
        "basisPages": WHOLE,
        "actualMinutes": _nullable("number"),
        "actualMegabytes": _nullable("number"),
        "minutesErrorPercent": _nullable("number"),
        "megabytesErrorPercent": _nullable("number"),
    }
) | {"type": ["object", "null"]}
GROUPS = {"jobs": "Jobs", "incoming": "Uploads", "ws": "Live"}  # by first segment; what /docs shows together
# Of any request: it is no HTTP, comes from another web site, or was meant for another host.
ANYWHERE = {400: "Problem", 403: "Problem", 421: "Problem"}


def _params_schema() -> dict[str, Any]:
    defaults = Params()
    properties: dict[str, Any] = {
        camel(name): {
            "type": ["integer", "null"] if nullable else "integer",
            "minimum": least,
            "maximum": most,
            "default": getattr(defaults, name),
        }
        for name, (least, most, nullable) in RANGES.items()
    }
    properties |= {
        camel(name): {"type": "string", "enum": list(allowed), "default": getattr(defaults, name)}
        for name, allowed in CHOICES.items()
    }
    properties |= {
        "model": {"type": "string", "default": defaults.model},
        "profile": {"type": ["string", "null"], "enum": [*screens.SCREENS, None], "default": None},
    }
    return _object(properties)


def _preview_schema(params: dict[str, Any], kind: Any, path: Any) -> dict[str, Any]:
    """Of POST /preview: an input's page."""
    side = {"type": "integer", "minimum": 8, "maximum": 65_535}
    start = {"type": "integer", "minimum": 0, "maximum": 65_535}
    crop = _object({"x": start, "y": start, "width": side, "height": side}) | {"type": ["object", "null"]}
    counts = {"type": "integer", "minimum": 1, "maximum": 20_000}
    sizes = {"type": ["integer", "null"], "minimum": 1, "maximum": 1 << 50}
    volume = _object({"pages": counts, "pixels": sizes, "bytes": sizes}, ("pixels", "bytes"))
    variants = {"type": "array", "minItems": 1, "maxItems": 4, "items": params | {"required": []}}
    return _object(
        {
            "input": _object({"type": kind, "path": path}),
            "page": _nullable(
                "integer", minimum=1, maximum=1 << 31, description="else the one in the middle"
            ),
            "crop": crop | {"description": "a part of the page, in its pixels; with scale alone"},
            "variants": variants | {"description": "as params of POST /jobs; [{}] by default"},
            "volume": volume | {"type": ["object", "null"], "description": "what an image sent belongs to"},
        },
        optional=("page", "crop", "variants", "volume"),
    )


def _previewed_schema(params: dict[str, Any]) -> dict[str, Any]:
    """Images stand as paths here, see GET /preview/{key}."""
    variant = {
        "params": params,
        "after": TEXT_TYPE,
        "width": WHOLE,
        "height": WHOLE,
        "bytes": WHOLE,
        "mode": TEXT_TYPE,
        "sha256": HASH,
        "model": _nullable("string"),
        "carried": TRUTH,
        "deviation": _nullable("string"),
        "seconds": {"type": "number"},
        "prediction": PREDICTION,
    }
    return _object(
        {
            "page": _nullable("integer"),
            "name": _nullable("string"),
            "pages": _nullable("integer"),
            "volume": _nullable("string", description="of several in the upload, with split, the middle one"),
            "volumes": _nullable("integer"),
            "before": TEXT_TYPE,
            "variants": {"type": "array", "items": _object(variant)},
        }
    )


@functools.cache
def schemas() -> dict[str, Any]:
    """The JSON schemas that ROUTES names."""
    params = _params_schema()
    return {
        "Object": {"type": "object"},
        **_request_schemas(params),
        **_job_schemas(_state_schema(params)),
        **_service_schemas(),
        "PageList": _object({"pages": {"type": "array", "items": _page_schema()}}),
        "Previewed": _previewed_schema(params),
    }


def _request_schemas(params: dict[str, Any]) -> dict[str, Any]:
    longest, (least, most) = uploads.TITLE_CHARACTERS, submissions.PRIORITIES
    title = {"type": "string", "minLength": 1, "maxLength": longest, "pattern": NOT_BLANK}
    path = {"type": "string", "minLength": 1, "pattern": f"^{NO_CONTROLS}+$"}
    kind = {"type": "string", "enum": ["folder", "zip"]}
    priority = {"type": "integer", "minimum": least, "maximum": most}
    of_submission = {
        "title": title,
        "volume": title,
        "input": _object({"type": kind, "path": path}),
        "params": params | {"type": ["object", "null"], "required": []},
        "manifest": _object({"files": {"type": "array"}}) | {"type": ["object", "null"]},
        "priority": priority
        | {"type": ["integer", "null"], "default": 0, "description": "higher ones start first"},
    }
    split = _object({"split": {"const": "volumes"}})
    return {
        "Submission": _object(of_submission, optional=("params", "manifest", "priority"))
        | {"not": _object({"manifest": {"type": "object"}, "params": split})},
        "Resume": {
            "type": "object",
            "anyOf": [
                _object({"inputPath": path, "inputType": kind}),
                {"properties": {"inputPath": {"type": "null"}, "inputType": {"type": "null"}}},
            ],
        },
        "Priority": _object({"priority": priority}),
        "PreviewRequest": _preview_schema(params, kind, path),
    }


def _state_schema(params: dict[str, Any]) -> dict[str, Any]:
    return _object(
        {
            "jobId": {"type": "string", "format": "uuid"},
            "status": {"type": "string", "enum": list(jobs.STATES)},
            "processed": {"type": "integer", "minimum": 0},
            "total": {"type": "integer", "minimum": 0},
            "artifactPath": _nullable("string"),
            "artifactHash": _nullable("string", pattern="^[0-9a-f]{64}$"),
            "message": _nullable("string"),
            "retries": {"type": "integer", "minimum": 0},
            "lastError": _nullable("string"),
            "params": params,
            "metadata": _object({"title": TEXT_TYPE, "volume": TEXT_TYPE}),
            "cancelled": TRUTH,
            "failedPages": {"type": "integer", "minimum": 0},
            "currentPage": _nullable("string"),
            "etaSeconds": _nullable("number"),
            "phase": {"type": "string", "enum": ["queued", "staging", "inferring", "packing", "done"]},
            "seq": {"type": "integer", "minimum": 1},
            "createdAt": {"type": "string", "format": "date-time"},
            "startedAt": _nullable("string", format="date-time"),
            "finishedAt": _nullable("string", format="date-time"),
            "errorCode": _nullable("string"),
            "leftOut": {"type": "integer", "minimum": 0},
            "priority": WHOLE,
            "prediction": PREDICTION,
        }
    )


def _job_schemas(state: dict[str, Any]) -> dict[str, Any]:
    report = {"type": ["object", "null"], "description": "artifact-report.json, once the job succeeded"}
    job_id = {"type": "string", "format": "uuid"}
    each = {"type": "array", "items": job_id, "description": EACH_VOLUME}
    return {
        "JobId": _object({"jobId": job_id, "jobIds": each}, optional=("jobIds",)),
        "JobState": state,
        "JobList": _object(
            {"jobs": {"type": "array", "items": _ref("JobState")}, "nextCursor": _nullable("string")}
        ),
        "Report": _object(state["properties"] | {"report": report, "timings": {"type": "object"}}),
    }


def _page_schema() -> dict[str, Any]:
    return _object(
        {
            "n": {"type": "integer", "minimum": 1},
            "name": TEXT_TYPE,
            "status": {"type": "string", "enum": ["pending", "upscaled", "carried"]},
            "source": _object({"filename": TEXT_TYPE, "sha256": HASH, "bytes": WHOLE}),
            "filename": _nullable("string"),
            "sha256": _nullable("string"),
            "bytes": _nullable("integer"),
            "width": _nullable("integer"),
            "height": _nullable("integer"),
            "mode": _nullable("string"),
            "error": _nullable("string"),
            "deviation": _nullable("string"),
            "colorSpread": _nullable("number"),
            "model": _nullable("string"),
            "seconds": _nullable("number"),
        }
    )


def _model_schema() -> dict[str, Any]:
    return _object(
        {
            "name": TEXT_TYPE,
            "scale": WHOLE,
            "recommended_scale": WHOLE,
            "weights": TEXT_TYPE,
            "download_url": TEXT_TYPE,
            "available": TRUTH,
            "source": _nullable("string"),
            "sha256": _nullable("string"),
            "architecture": _nullable("string"),
            "license": _nullable("string"),
            "error": _nullable("string"),
            "probed": TRUTH,
        }
    )


def _cluster_schema() -> dict[str, Any]:
    status = {"type": "string", "enum": ["ready", "idle", "waiting"]}
    return _object({"status": status, "devices": WHOLE, "detail": _nullable("string")})


def _service_schemas() -> dict[str, Any]:
    fault = _object({"field": TEXT_TYPE, "message": TEXT_TYPE})
    models = {"type": "array", "items": _model_schema()}
    devices = {"type": "array", "items": {"type": "object"}}
    return {
        "Queue": _object(
            {
                "paused": TRUTH,
                "waiting": WHOLE,
                "running": WHOLE,
                "highestPriority": _nullable("integer", description="of those that wait"),
            }
        ),
        "Stored": _object({"path": TEXT_TYPE, "bytes": WHOLE, "sha256": HASH}),
        "ModelList": _object({"models": models, "probed": TRUTH}),
        "DeviceList": _object({"devices": devices, "probed": TRUTH}),
        "Health": _object(
            {
                "status": {"type": "string", "enum": ["ok", "stopping"]},
                "active_jobs": WHOLE,
                "registered_jobs": WHOLE,
                "default_model": TEXT_TYPE,
                "max_concurrency": WHOLE,
                "paused": TRUTH,
                "version": TEXT_TYPE,
                "uptime_s": {"type": "number"},
                "workers": WHOLE,
                "workers_can_start": TRUTH,
                "database_set_aside": TRUTH,
                "rebuilding": TRUTH,
                "rebuilt_jobs": WHOLE,
                "cluster": _cluster_schema(),
            },
            optional=("cluster",),
        ),
        "Problem": _object(
            {
                "type": TEXT_TYPE,
                "title": TEXT_TYPE,
                "status": WHOLE,
                "detail": TEXT_TYPE,
                "code": TEXT_TYPE,
                "errors": {"type": "array", "items": fault},
            },
            optional=("errors",),
        ),
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _content(what: str, least: int = 0) -> dict[str, Any]:
    """What: names of schemas and media types; least: bytes of a body that is no form."""
    binary: dict[str, Any] = {"type": "string", "format": "binary"}
    raw = binary | ({"minLength": least} if least else {})
    form = _object({"image": binary})
    if "PreviewRequest" in what:
        text = "JSON as for an input, without input and page"
        json_text = {"contentMediaType": "application/json", "description": text}
        form["properties"]["request"] = TEXT_TYPE | json_text
    found: dict[str, Any] = {}
    for one in what.split(", "):
        if "/" in one:
            found[one] = {"schema": form if "form-data" in one else raw}
        else:
            media = "application/problem+json" if one == "Problem" else "application/json"
            found[media] = {"schema": _ref(one)}
    return found


def _operation(route: Route) -> dict[str, Any]:
    names = re.findall(r"\{(\w+)", route.path)
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": VARIABLES[name]} for name in names
    ]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in route.query.items()]
    parameters += [{"name": name, "in": "header", "schema": schema} for name, schema in route.headers.items()]
    answers = ANYWHERE | dict(route.answers) | ({} if route.open else {401: "Problem"})
    operation: dict[str, Any] = {
        "operationId": route.handler,
        "tags": [GROUPS.get(route.path.split("/")[1], "Service")],
        "summary": route.summary,
        "parameters": parameters,
        "responses": {
            str(status): {"description": http.HTTPStatus(status).phrase}
            | ({"content": _content(what)} if what else {})
            for status, what in sorted(answers.items())
        },
    }
    if route.body:
        needed = not route.body_optional
        operation["requestBody"] = {"required": needed, "content": _content(route.body, least=int(needed))}
    if route.open:
        operation["security"] = []
    return operation


def document(routes: Sequence[Route], version: str, secured: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document. secured: whether this service asks for a token."""
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path.replace("...", ""), {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Manga Upscale Service", "version": version},
        "paths": paths,
        "components": {
            "schemas": schemas(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "session": {"type": "apiKey", "in": "cookie", "name": COOKIE},
            },
        },
        "security": [{"bearer": []}, {"session": []}] if secured else [],
    }


def page(routes: Sequence[Route]) -> str:
    """The table of routes as an HTML page."""
    rows = "".join(
        f"<tr><td>{route.method}</td><td><code>{html.escape(route.path)}</code></td>"
        f"<td>{html.escape(route.summary)}</td><td>{', '.join(map(str, sorted(route.answers)))}</td></tr>"
        for route in routes
    )
    style = (
        "body{font:16px system-ui;margin:2rem auto;max-width:60rem;color-scheme:light dark}"
        "td{padding:.2rem .8rem}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Interface</title><style>{style}</style>'
        "<h1>Manga Upscale Service: interface</h1>"
        "<p>Requests can be tried out here once <code>pip install flask-swagger-ui</code> has been run.</p>"
        '<p>The whole description, for programs: <a href="openapi.json">openapi.json</a>.</p>'
        f"<table><tr><th>Method</th><th>Path</th><th>What</th><th>Answers</th></tr>{rows}</table></html>"
    )
