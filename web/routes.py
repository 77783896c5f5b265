"""Which request goes to which method of Api, and what /openapi.json says of it.

Map: what several say - ROUTES
Rule: a route is one row of ROUTES; requests are routed, documented and tested from it.
Runs in: anywhere; a table.
"""

from __future__ import annotations

import jobs
from files import containers
from web import reader
from web.openapi import Route

ZIP = ", ".join(containers.MEDIA_TYPES.values())
IMAGE, TEXT, PAGE = "image/*, application/octet-stream", "text/plain", "text/html"
ASSET = "text/javascript, text/css"
WIDTH = {"type": "integer", "minimum": 16, "maximum": 4096}
LISTED = 100  # jobs of an answer, where nothing else is asked for
LIMIT = {"type": "integer", "minimum": 1, "maximum": 500, "default": LISTED}
TEXT_OF_PARAM = {"type": "string", "description": "as in POST /jobs; unusable, the page comes back as it was"}
TEXT_OF_VARIANT = {"type": "string", "description": "as in POST /jobs, where the body is an image"}
CURSOR = {"type": "integer", "minimum": 0, "maximum": 2**62}
CONDITIONS = {
    name: {"type": "string", "description": text}
    for name, text in {
        "Range": "bytes=first-last, one range",
        "If-Range": "the ETag that the range belongs to",
        "If-None-Match": "an ETag: 304 while it is the present one",
        "If-Match": "an ETag: 412 once it is not the present one",
    }.items()
}
IMAGE_ANSWERS: dict[int, str | None] = {200: IMAGE, 206: IMAGE, 304: None} | dict.fromkeys(
    (404, 409, 410, 412, 416, 422, 503), "Problem"
)
REPEATABLE = {
    "type": "string",
    "minLength": 1,
    "maxLength": 255,
    "description": "the same key and body again give the same job",
}

ROUTES = (
    Route(
        "POST",
        "/jobs",
        "submit",
        "Submit a volume",
        {
            202: "JobId",
            400: "Problem",
            409: "Problem",
            413: "Problem",
            415: "Problem",
            422: "Problem",
            503: "Problem",
            507: "Problem",
        },
        headers={"Idempotency-Key": REPEATABLE},
        body="Submission",
    ),
    Route(
        "GET",
        "/jobs",
        "list_jobs",
        "List jobs, newest first",
        {200: "JobList", 422: "Problem"},
        query={
            "status": {"type": "string", "enum": list(jobs.STATES)},
            "q": {"type": "string"},
            "limit": LIMIT,
            "cursor": CURSOR,
        },
    ),
    Route("GET", "/jobs/{id}", "job", "One job's state", {200: "JobState", 404: "Problem"}),
    Route(
        "DELETE",
        "/jobs/{id}",
        "delete",
        "Remove a job, its outputs and artifact",
        {204: None, 404: "Problem", 409: "Problem"},
    ),
    Route(
        "POST",
        "/jobs/{id}/resume",
        "resume",
        "Go on with a job that ended unfinished",
        {
            200: "JobState",
            400: "Problem",
            404: "Problem",
            413: "Problem",
            415: "Problem",
            422: "Problem",
            503: "Problem",
        },
        body="Resume",
        body_optional=True,
    ),
    Route("POST", "/jobs/{id}/cancel", "cancel", "Stop a job", {200: "JobState", 404: "Problem"}),
    Route(
        "POST",
        "/jobs/{id}/priority",
        "prioritize",
        "Let a job start earlier or later",
        {
            200: "JobState",
            400: "Problem",
            404: "Problem",
            413: "Problem",
            415: "Problem",
            422: "Problem",
        },
        body="Priority",
    ),
    Route("GET", "/queue", "queue", "What waits, and whether it stands still", {200: "Queue"}),
    Route("POST", "/queue/pause", "pause_queue", "Start nothing more, compute no more pages", {200: "Queue"}),
    Route("POST", "/queue/resume", "resume_queue", "Go on", {200: "Queue"}),
    Route("GET", "/jobs/{id}/pages", "pages", "Every page of a job", {200: "PageList", 404: "Problem"}),
    Route(
        "GET",
        "/jobs/{id}/pages/{n}/before",
        "before",
        "A page as it came",
        IMAGE_ANSWERS,
        query={"w": WIDTH},
        headers=CONDITIONS,
    ),
    Route(
        "GET",
        "/jobs/{id}/pages/{n}/after",
        "after",
        "A page upscaled",
        IMAGE_ANSWERS,
        query={"w": WIDTH},
        headers=CONDITIONS,
    ),
    Route(
        "GET",
        "/jobs/{id}/artifact",
        "artifact",
        "The finished volume",
        {
            200: ZIP,
            206: ZIP,
            304: None,
            404: "Problem",
            409: "Problem",
            410: "Problem",
            412: "Problem",
            416: "Problem",
            503: "Problem",
        },
        headers=CONDITIONS,
    ),
    Route("GET", "/jobs/{id}/report", "report", "State, report and timings", {200: "Report", 404: "Problem"}),
    Route(
        "PUT",
        "/incoming/{path...}",
        "upload",
        "Upload an archive or a page",
        {
            201: "Stored",
            204: None,
            400: "Problem",
            409: "Problem",
            413: "Problem",
            422: "Problem",
            503: "Problem",
            507: "Problem",
        },
        headers={"Repr-Digest": {"type": "string", "description": "sha-256=:base64:, checked"}},
        body="application/octet-stream",
        body_optional=True,
    ),
    Route(
        "POST",
        "/pages",
        "convert",
        "One page upscaled, for a manga reader; as it came where that fails",
        {200: IMAGE, 413: "Problem", 415: "Problem", 503: "Problem"},
        query=dict.fromkeys(reader.PARAMETERS, TEXT_OF_PARAM),
        body="multipart/form-data, image/*, application/octet-stream",
    ),
    Route(
        "POST",
        "/preview",
        "preview",
        "A page or a part of one in several settings, and what its volume would take",
        {200: "Previewed"} | dict.fromkeys((400, 413, 415, 422, 503, 507), "Problem"),
        query=dict.fromkeys(reader.PARAMETERS, TEXT_OF_VARIANT),
        body="PreviewRequest, multipart/form-data, image/*, application/octet-stream",
    ),
    Route(
        "GET",
        "/preview/{key}",
        "preview_image",
        "An image that POST /preview named",
        {200: IMAGE, 206: IMAGE, 304: None} | dict.fromkeys((404, 412, 416), "Problem"),
        headers=CONDITIONS,
    ),
    Route("GET", "/models", "models", "Models and their weights", {200: "ModelList"}),
    Route("POST", "/session", "open_session", "A cookie for browsers", {204: None, 401: "Problem"}),
    Route("DELETE", "/session", "close_session", "Drop the cookie", {204: None, 401: "Problem"}),
    Route("GET", "/health", "health", "Is it up, is it busy", {200: "Health"}, open=True),
    Route("GET", "/devices", "devices", "Devices that torch can use", {200: "DeviceList"}),
    Route("GET", "/metrics", "metrics", "For Prometheus", {200: TEXT}),
    Route("GET", "/openapi.json", "openapi", "This interface", {200: "Object"}, open=True),
    Route("GET", "/docs", "docs", "This interface, readable", {200: PAGE}, open=True),
    Route(
        "GET",
        "/docs/{file}",
        "docs_asset",
        "What /docs needs",
        {200: ASSET, 206: ASSET, 304: None, 404: "Problem", 412: "Problem", 416: "Problem"},
        headers=CONDITIONS,
        open=True,
    ),
    Route("GET", "/", "index", "The web page", {200: PAGE}, open=True),
    Route(
        "GET",
        "/ws/jobs",
        "watch_all",
        "WebSocket: every job's changes",
        {101: None, 422: "Problem", 426: "Problem", 503: "Problem"},
        query={"after": CURSOR},
    ),
    Route(
        "GET",
        "/ws/jobs/{id}",
        "watch_job",
        "WebSocket: one job's changes",
        {101: None, 422: "Problem", 426: "Problem", 503: "Problem"},
        query={"after": CURSOR},
    ),
)
