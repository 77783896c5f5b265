"""What clients ask for, and what they are told: submissions, resumes, deletions; states and reports.

Map: Submission - parse_submission, parse_params - submit, resume, delete - artifact_of, remove_files,
     sweep_previews - to_state, to_report
Rule: nothing is stored of a request before all of it was found valid.
Runs in: http-N threads, the dispatcher (reports), ws-loop (states). All SQL is jobs.py's.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jobs
import logs
import storage
from engine import screens
from files import inputs, weightfiles
from messages import (
    AUTO_MODEL,
    CHOICES,
    CONTAINER_FORMATS,
    RANGES,
    Limits,
    Params,
    Plan,
    camel,
    reported,
)
from storage import Layout
from work import predict
from work.uploads import TITLE_CHARACTERS


@dataclass(frozen=True, slots=True)
class Submission:
    """A POST /jobs body, checked."""

    title: str
    volume: str
    input_type: str
    input_path: str
    params: Params
    manifest: dict[str, Any] | None
    priority: int = 0


PRIORITIES = (-100, 100)  # least, most
JOB_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
INPUT_UNKNOWN = "where this job's input lies is not known: it was rebuilt from its artifact"


def pick(body: dict[str, Any], name: str) -> Any:
    """A value under its camelCase or snake_case key; None where neither is there."""
    return body.get(camel(name), body.get(name))


def parse_submission(body: dict[str, Any], models: dict[str, str]) -> Submission:
    """Check a POST /jobs body. models: model_key -> name. Raises InvalidFields with all faults."""
    errors: list[tuple[str, str]] = []
    title = _text(body, "title", errors)
    volume = _text(body, "volume", errors)
    source = body.get("input")
    if not isinstance(source, dict):
        errors.append(("input", 'is required: {"type": "folder" | "zip", "path": "incoming/..."}'))
        source = {"type": "zip", "path": "-"}
    kind, path = source.get("type"), source.get("path")
    if kind not in ("folder", "zip"):
        errors.append(("input.type", 'must be "folder" or "zip"'))
    if not isinstance(path, str) or not path or not _encodable(path):
        errors.append(("input.path", "must name something inside incoming/"))
    manifest = body.get("manifest")
    if manifest is not None and not (isinstance(manifest, dict) and isinstance(manifest.get("files"), list)):
        errors.append(("manifest", 'must be an object with a list "files"'))
    given = body.get("params")
    if given is not None and not isinstance(given, dict):
        errors.append(("params", "must be an object"))
        given = None
    params = parse_params(given or {}, models, errors)
    priority = 0 if body.get("priority") is None else parse_priority(body, errors)
    if manifest is not None and params.split != "none":
        errors.append(("manifest", "is one volume's; with params.split put one into each"))
    if errors:
        raise jobs.InvalidFields(errors)
    return Submission(title, volume, str(kind), str(path), params, manifest, priority)


def parse_priority(body: dict[str, Any], errors: list[tuple[str, str]]) -> int:
    """A request's `priority`; a fault is added to `errors`."""
    value, (least, most) = body.get("priority"), PRIORITIES
    if type(value) is not int or not least <= value <= most:
        errors.append(("priority", f"must be a whole number from {least} to {most}"))
        return 0
    return value


def parse_params(given: dict[str, Any], models: dict[str, str], errors: list[tuple[str, str]]) -> Params:
    """Params from a request's `params`, defaults filled in; faults are added to `errors`."""
    values: dict[str, Any] = {}
    for name, (least, most, nullable) in RANGES.items():
        value = pick(given, name)
        if value is None:
            if not nullable and (name in given or camel(name) in given):
                errors.append((f"params.{camel(name)}", "must not be null"))
        # bool is an int to Python, and 2.0 is no integer to a strict client.
        elif type(value) is not int or not least <= value <= most:
            also = " or null" if nullable else ""
            errors.append((f"params.{camel(name)}", f"must be a whole number from {least} to {most}{also}"))
        else:
            values[name] = value
    for name, allowed in CHOICES.items():
        value = pick(given, name)
        if value in allowed:
            values[name] = value
        elif value is not None or name in given or camel(name) in given:
            errors.append((f"params.{camel(name)}", f"must be one of {', '.join(allowed)}"))
    values = _of_profile(given.get("profile"), errors) | values
    model = given.get("model", Params().model)
    if isinstance(model, str) and model.lower() == AUTO_MODEL:
        values["model"] = AUTO_MODEL
    elif isinstance(model, str) and weightfiles.model_key(model) in models:
        values["model"] = models[weightfiles.model_key(model)]
    else:
        known = ", ".join(sorted(set(models.values())))
        errors.append(("params.model", f"is not a model here; there are {known}, and {AUTO_MODEL}"))
    params = Params(**values)
    _check_container(params, errors)
    return params


def _check_container(params: Params, errors: list[tuple[str, str]]) -> None:
    if params.container in CONTAINER_FORMATS:
        from files import books

        if why := books.refusal(params):
            errors.append(("params.container", why))


def _of_profile(name: Any, errors: list[tuple[str, str]]) -> dict[str, Any]:
    """What an e-reader stands for, where the request does not say it itself."""
    if isinstance(name, str) and name in screens.SCREENS:
        return screens.settings_of(name) | {"profile": name}
    if name is not None:
        errors.append(("params.profile", f"must be null or one of {', '.join(screens.SCREENS)}"))
    return {}


def _text(body: dict[str, Any], name: str, errors: list[tuple[str, str]]) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value.strip():
        errors.append((name, "is required, a text"))
        return ""
    if len(value) > TITLE_CHARACTERS or not _encodable(value):
        errors.append((name, f"must be valid Unicode of at most {TITLE_CHARACTERS} characters, no controls"))
    return value.strip()


def _encodable(text: str) -> bool:
    return not any(unicodedata.category(c) in ("Cc", "Cs") for c in text)


# ---------------------------------------------------------------- submit, resume, delete
def submit(
    table: jobs.JobTable,
    layout: Layout,
    wanted: Submission,
    key: str | None,
    body_hash: str,
    limits: Limits,
    reserve_bytes: int | None = None,
) -> jobs.Job:
    """A new job, or the one that this Idempotency-Key made before.

    reserve_bytes: what must stay free on the disk beside the job's own; None: unchecked.
    Raises KeyReused and as checked().
    """
    return submit_all(table, key, body_hash, lambda: [checked(layout, wanted, limits, reserve_bytes)])[0]


def submit_all(
    table: jobs.JobTable, key: str | None, body_hash: str, prepare: Callable[[], Sequence[Submission]]
) -> list[jobs.Job]:
    """A job for each of what prepare() checked, or those that this Idempotency-Key made before; of several
    those that were deleted since are made anew. Raises KeyReused and what prepare() does, which is called
    while the job table is free."""
    before = submitted(table, key, body_hash)
    if before and len(before) >= _place(before[0])[1]:
        return before
    each = prepare()
    keys = [key and (f"{key}\n{n}/{len(each)}" if len(each) > 1 else key) for n in range(1, len(each) + 1)]
    with table.transaction():
        # Another request with this key may have been quicker.
        before = submitted(table, key, body_hash)
        if before and _place(before[0])[1] != len(each):
            return before  # the input is another by now
        made = {job.idempotency_key: job for job in before}
        return [
            made.get(one) or insert(table, wanted, one, body_hash)
            for one, wanted in zip(keys, each, strict=True)
        ]


def _place(job: jobs.Job) -> tuple[int, int]:
    """(which, of how many) of the jobs that one key made."""
    n, _, count = (job.idempotency_key or "").partition("\n")[2].partition("/")
    return int(n or 1), int(count or 1)


def checked(layout: Layout, wanted: Submission, limits: Limits, reserve_bytes: int | None) -> Submission:
    """The same with its input's path below incoming/, found there, and with room for it. This may read
    an archive: not to be done while the job table is locked.

    Raises storage.OutsideIncoming, storage.InputMissing, storage.NoRoom, and for a place inside an
    archive storage.InputUnusable's family.
    """
    place = checked_input(layout, wanted.input_path, wanted.input_type, limits)
    if reserve_bytes is not None:
        sizes = inputs.input_sizes(layout.incoming / place, limits)
        inputs.check_room(layout.root, sizes, (), wanted.params, reserve_bytes)
    return replace(wanted, input_path=place)


def submitted(table: jobs.JobTable, key: str | None, body_hash: str) -> list[jobs.Job]:
    """The jobs that this Idempotency-Key made before. Raises KeyReused."""
    found = sorted(table.by_key(key) if key else [], key=_place)
    if any(job.request_hash != body_hash for job in found):
        raise jobs.KeyReused("this Idempotency-Key came with another body before; use a new one")
    return found


def insert(table: jobs.JobTable, wanted: Submission, key: str | None, body_hash: str) -> jobs.Job:
    """A new job, whose input_path was checked."""
    job_id = str(uuid.uuid4())
    with table.transaction():
        table.insert(
            {
                "id": job_id,
                "title": wanted.title,
                "volume": wanted.volume,
                "input_type": wanted.input_type,
                "input_path": wanted.input_path,
                "params": wanted.params,
                "manifest": wanted.manifest,
                "priority": wanted.priority,
                "idempotency_key": key,
                "request_hash": body_hash,
            }
        )
        job = table.get(job_id)
    jobs.log.info("submitted: %s, %s, from %s", job.title, job.volume, job.input_path, extra=logs.of(job_id))
    return job


def checked_input(layout: Layout, path: str, kind: str, limits: Limits) -> str:
    """A client's path below incoming/. Raises storage.OutsideIncoming, storage.InputMissing, and for
    a place inside an archive storage.InputUnusable's family."""
    place = inputs.resolve_incoming(layout, path)
    inputs.check_input(place, kind, limits)
    return place.relative_to(layout.incoming).as_posix()


def resume(
    table: jobs.JobTable,
    layout: Layout,
    job_id: str,
    given: tuple[str, str] | None,
    limits: Limits,
) -> jobs.Job:
    """Queue what is left of a job that is over; other jobs are answered unchanged.

    given: another (path, type) of the input. Raises UnknownJob, storage.OutsideIncoming,
    and storage.InputMissing if work remains and the input is gone.
    """
    job = table.get(job_id)
    if not job.is_over or (job.state == jobs.SUCCESS and not job.failed_pages):
        return job
    if not job.input_path and given is None:
        raise storage.InputMissing(f"{INPUT_UNKNOWN}; upload it and resume with inputPath and inputType")
    pages = table.pages(job_id)
    # Without their files the pages must be computed again, and for that the input must be there.
    lost = job.outputs_removed_s is not None
    remains = lost or not pages or any(page.status == "pending" or page.failed for page in pages)
    path, kind = given or (f"incoming/{job.input_path}", job.input_type)
    place = inputs.resolve_incoming(layout, path)
    upload = place.relative_to(layout.incoming).as_posix()
    if job.params.split != "none" and job.input_path.startswith(f"{upload}/"):
        # The upload that this volume lies in, which is all that its sender named: the volume, not all of it.
        kind, place = job.input_type, inputs.resolve_incoming(layout, f"incoming/{job.input_path}")
    if remains:
        inputs.check_input(place, kind, limits)
    input_path = place.relative_to(layout.incoming).as_posix()
    with table.transaction():
        seen, job = job, table.get(job_id)
        if (job.state, job.attempt) != (seen.state, seen.attempt):
            return job  # another request was quicker
        moved = (input_path, kind) != (job.input_path, job.input_type)
        if remains or (moved and inputs.located(place)[0].exists()):
            table.forget_staged(job_id)
        redone = table.reset_failed_pages(job_id)
        # The artifact stays on disk, unseen, until the next one replaces it: removed from here, it
        # could be the next one already.
        return jobs.advance(
            table,
            job,
            "resume",
            table.clock(),
            retries=job.retries + 1,
            input_path=input_path,
            input_type=kind,
            cancelled=False,
            message=None,
            last_error=None,
            error_code=None,
            artifact_hash=None,
            artifact_bytes=None,
            outputs_removed_s=None,
            artifact_removed_s=None,
            failed_pages=0,
            processed=job.processed - redone,
            phase="queued",
            finished_s=None,
        )


def delete(table: jobs.JobTable, layout: Layout, job_id: str) -> None:
    """Remove a job with its outputs and artifact. Raises UnknownJob, JobIsRunning, storage.FilesInUse.

    Files go first: what a crash leaves is a job that can be deleted again, never
    files that belong to nobody. One that waits is cancelled before: it must not start
    while its finished pages go.
    """
    job = table.get(job_id)
    if job.state == jobs.PENDING:
        job = jobs.cancel(table, job_id, table.clock())
    if job.state == jobs.RUNNING:
        raise jobs.JobIsRunning(f"job {job_id} is running; cancel it first")
    remove_files(layout, job)
    if not table.delete(job):
        table.get(job_id)  # unknown: another request was quicker
        raise jobs.JobIsRunning(f"job {job_id} has just started; cancel it first")
    jobs.log.info("deleted", extra=logs.of(job_id))


def artifact_of(job: jobs.Job, layout: Layout) -> Path:
    """Where a job's artifact is, once it is finished."""
    return layout.artifact(job.title, job.volume, job.id, job.params.container)


def remove_files(layout: Layout, job: jobs.Job, outputs: bool = True, artifact: bool = True) -> None:
    """Remove a job's pages (with previews and working copy), its artifact, or both. Raises FilesInUse."""
    in_use = storage.FilesInUse(
        f"files of job {job.id} can't be removed now: a program has them open, or their folder is "
        "read-only; try again then"
    )
    if artifact:
        try:
            storage.remove_file(artifact_of(job, layout))
        except PermissionError as error:
            raise in_use from error
    if outputs:
        held = [layout.output_dir(job.title, job.volume, job.id)]
        held += [layout.staging / job.id, layout.previews / job.id]
        for folder in held:
            storage.remove_tree(folder)
        if any(folder.exists() for folder in held):
            raise in_use


def sweep_previews(table: jobs.JobTable, layout: Layout) -> None:
    """Remove previews of jobs that are gone: whoever was at one while its job was deleted brought its
    folder back. Raises OSError, sqlite3.Error."""
    found = [folder for folder in layout.previews.glob("*") if JOB_ID.fullmatch(folder.name)]
    known = table.ids()  # read later than the folders: no new job's is among those
    for folder in found:
        if folder.name not in known:
            storage.remove_tree(folder)


def note_removed(table: jobs.JobTable, job: jobs.Job, what: str, days: int) -> bool:
    """Record what age removed, if the job still is as it was read; `what`: see REMOVED, else the row."""
    if what not in jobs.REMOVED:
        return table.delete(job, as_read=True)
    column, words, _ = jobs.REMOVED[what]
    note = f"{words} removed after {days} days (REICHAN_KEEP_{what.upper()})"
    message = f"{job.message}. {note}" if job.message else note
    return table.change(job, message=message, **{column: table.clock()})


# ---------------------------------------------------------------- what they are told
def to_state(job: jobs.Job, layout: Layout) -> dict[str, Any]:
    """JobState, as REST and WebSocket send it."""
    there = job.artifact_hash and not job.artifact_removed_s
    artifact = artifact_of(job, layout) if there else None
    return {
        "jobId": job.id,
        "status": job.state,
        "processed": job.processed,
        "total": job.total,
        "artifactPath": layout.relative(artifact) if artifact else None,
        "artifactHash": job.artifact_hash,
        "message": job.message,
        "retries": job.retries,
        "lastError": job.last_error,
        "params": {camel(key): value for key, value in asdict(job.params).items()},
        "metadata": {"title": job.title, "volume": job.volume},
        "cancelled": job.cancelled,
        "failedPages": job.failed_pages,
        "currentPage": job.current_page,
        "etaSeconds": job.eta_s,
        "phase": job.phase,
        "seq": job.seq,
        "createdAt": iso(job.created_s),
        "startedAt": iso(job.started_s),
        "finishedAt": iso(job.finished_s),
        "errorCode": job.error_code,
        "leftOut": job.left_out,
        "priority": job.priority,
        "prediction": predict.to_json(jobs.parsed(job.forecast)),
    }


def iso(when_s: float | None) -> str | None:
    """RFC 3339 in UTC, milliseconds."""
    if when_s is None:
        return None
    moment = datetime.fromtimestamp(when_s, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def to_report(job: jobs.Job, pages: list[jobs.Page], layout: Layout) -> dict[str, Any]:
    """artifact-report.json: nothing in it but the input, the plan and the results. To that of a
    cbz, containers.complete() adds "files"."""
    assert job.plan is not None
    plan = job.plan
    failed = sum(page.failed for page in pages)
    return {
        "schemaVersion": 1,
        "jobId": job.id,
        "title": job.title,
        "volume": job.volume,
        "processed": len(pages),
        "total": len(pages),
        "model": plan.model,
        "outscale": job.params.scale,
        "device": plan.device,
        "precision": plan.precision,
        "engine": plan.engine,
        "weightsSha256": plan.weights_sha256,
        "weightsSource": plan.weights_source,
        "tile": plan.tile,
        "haloPx": plan.halo_px,
        "batch": plan.batch,
        "choices": [_choice_of(one) for one in plan.choices],
        "params": {camel(name): value for name, value in reported(job.params).items()},
        "summary": {"processed": len(pages) - failed, "failed": failed},
        "leftOut": job.left_out,
        "items": [item_of(page) for page in pages],
        "reconciliation": jobs.parsed(job.reconciliation),
        "outputDir": layout.relative(layout.output_dir(job.title, job.volume, job.id)),
    }


def _choice_of(plan: Plan) -> dict[str, Any]:
    return {
        "model": plan.model,
        "weightsSha256": plan.weights_sha256,
        "weightsSource": plan.weights_source,
        "precision": plan.precision,
        "tile": plan.tile,
        "haloPx": plan.halo_px,
        "batch": plan.batch,
    }


def item_of(page: jobs.Page) -> dict[str, Any]:
    """What the report says of a page, and GET /jobs/{id}/pages with it."""
    return {
        "filename": page.output,
        "sha256": page.sha256,
        "bytes": page.bytes,
        "width": page.width,
        "height": page.height,
        "mode": page.mode,
        "source": {"filename": page.name, "sha256": page.source_sha256, "bytes": page.source_bytes},
        "status": page.status,
        "error": page.error,
        "deviation": page.deviation,
        "colorSpread": page.color_spread,
        "model": page.model,
    }


def closing_message(job: jobs.Job, pages: list[jobs.Page], artifact_bytes: int) -> str | None:
    """What a person should know of a finished job; None when all is well."""
    parts = []
    most = job.params.max_artifact_bytes
    if most is not None and artifact_bytes > most:
        parts.append(f"the artifact has {artifact_bytes} bytes, over the {most} of maxArtifactBytes")
    failed = [page for page in pages if page.failed]
    if failed:
        named = "; ".join(f"{page.name}: {page.error}" for page in failed[:3])
        more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        parts.append(f"{len(failed)} of {len(pages)} pages kept as they were ({named}{more})")
    compared = jobs.parsed(job.reconciliation)
    if compared and (compared["missing"] or compared["extra"]):
        parts.append(
            f"the manifest names {len(compared['missing'])} pages that are missing; "
            f"{len(compared['extra'])} pages are not in it"
        )
    return ". ".join(parts) or None


def request_hash(body: Any) -> str:
    """Equal for equal JSON values, whatever their spelling."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
