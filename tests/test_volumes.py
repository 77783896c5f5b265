"""Several volumes in one upload: which they are, and a job for each; all ids, or nothing.

From end to end, with a worker: test_containers.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from client import Client
from serving import png, still, volume

import jobs
import server
import settings
import storage
from messages import Limits, Params
from work import volumes, watch

ONE = volume({"1.png": png(shade=1), "ComicInfo.xml": b"<ComicInfo/>"})


def laid(root: Path, names: list[str], kind: str) -> Path:
    """A folder or archive with these files; archives hold a page."""
    files = {name: ONE if name.endswith((".zip", ".cbz")) else png() for name in names}
    if kind == "zip":
        (root / "in.zip").write_bytes(volume(files))
        return root / "in.zip"
    for name, data in files.items():
        (root / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "in" / name).write_bytes(data)
    return root / "in"


# ---------------------------------------------------------------- which they are
SPLITS = [
    (["v2/1.png", "v10/1.png", "v1/1.png"], ["v1", "v2", "v10"]),
    (["S/v1/1.png", "S/v2/1.png"], ["S/v1", "S/v2"]),
    (["A/S/v1.cbz", "A/S/v2.zip", "A/S/about.txt"], ["A/S/v1.cbz", "A/S/v2.zip"]),
    (["v1/1.png", "v2.cbz", "v3/a/b/1.png", "v3/c/1.png"], ["v1", "v2.cbz", "v3"]),
    (["v1/ch1/1.png", "v1/ch2/1.png", "v2/1.png"], ["v1", "v2"]),
    (["part/v1.cbz", "part/v2.cbz", "v3.cbz"], ["part/v1.cbz", "part/v2.cbz", "v3.cbz"]),
    (["part/v1/1.png", "part/v2.cbz", "v3/1.png"], ["part/v1", "part/v2.cbz", "v3"]),
    (["1.png", "2.png", "notes.txt"], [""]),
    (["S/1.png"], ["S"]),
    (["v1.cbz"], ["v1.cbz"]),
    (["v1/1.png", "v2/1.png", ".trash/1.png", "__MACOSX/v1/1.png", "@eaDir/v1/1.png"], ["v1", "v2"]),
]


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(("names", "expected"), SPLITS, ids=range(len(SPLITS)))
def test_the_volumes_are_what_lies_in_the_topmost_folder_that_holds_more_than_one(
    tmp_path, kind, names, expected
):
    found = volumes.find(laid(tmp_path, names, kind), Limits())
    assert ["/".join(one.parts) for one in found] == expected


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    "names",
    [
        ["cover.png", "v1/1.png", "v2/1.png"],
        ["cover.png", "v1.cbz"],
        ["S/v1/1.png", "S/v1/x.zip", "S/v2/1.png"],
    ],
    ids=range(3),
)
def test_a_page_that_would_be_lost_beside_volumes_is_refused_by_name(tmp_path, kind, names):
    with pytest.raises(storage.InputUnusable, match=names[0]):
        volumes.find(laid(tmp_path, names, kind), Limits())


def test_an_archive_that_is_still_being_received_is_waited_for(tmp_path):
    place = laid(tmp_path, ["v1.cbz", "v2.cbz"], "folder")
    (place / "v2.cbz.PARTIAL").write_bytes(b"half")
    with pytest.raises(storage.InputUnusable, match=r"v2\.cbz"):
        volumes.find(place, Limits())


def test_neither_pages_nor_archives_are_no_volumes(tmp_path):
    for kind in ("folder", "zip"):
        with pytest.raises(storage.NoPages):
            volumes.find(laid(tmp_path, ["a/notes.txt"], kind), Limits())


def test_too_many_volumes_are_refused_with_their_number(tmp_path):
    names = [f"v{n}/1.png" for n in range(volumes.MOST + 1)]
    with pytest.raises(storage.InputUnusable, match=str(volumes.MOST + 1)):
        volumes.find(laid(tmp_path, names, "zip"), Limits())


def test_a_folder_may_hold_more_in_all_than_one_volume_may(tmp_path):
    place = laid(tmp_path, ["v1/1.png", "v2/1.png"], "folder")
    limits = Limits(total_bytes=len(png()), entries=1)
    assert len(volumes.find(place, limits)) == 2
    with pytest.raises(storage.LimitExceeded):
        volumes.find(laid(tmp_path, ["v1/1.png", "v2/1.png"], "zip"), limits)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["S v01", "S v02.cbz", "S v10"], ["01", "02", "10"]),
        (["第1巻", "第2巻"], ["1", "2"]),
        (["v1", "extra"], ["v1", "extra"]),
        (["v1", "bonus 1.zip"], ["v1", "bonus 1"]),
        (["a/x", "b/x"], ["a x", "b x"]),
        (["a" * 400, "b"], ["a" * 300, "b"]),
    ],
)
def test_a_volume_is_called_by_its_number_or_its_name(paths, names):
    found = [volumes.Volume(tuple(path.split("/")), path.endswith((".zip", ".cbz")), []) for path in paths]
    assert volumes.names_of(found) == names


# ---------------------------------------------------------------- submitting
@pytest.fixture
def world(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A service where nobody works."""
    with still(tmp_path / "root") as service:
        yield SimpleNamespace(
            service=service, client=Client(service.url), incoming=service.config.layout.incoming
        )


def ask(client: Client, path: str, kind: str, key: str | None = None, **more: Any) -> Any:
    body = {"title": "作品名", "volume": "all", "input": {"type": kind, "path": path}}
    params = {"split": "volumes"} | more.pop("params", {})
    headers = {"Idempotency-Key": key} if key else {}
    return client.call("POST", "/jobs", body | {"params": params} | more, headers)


def rows(service: server.Service) -> list[tuple[str, str, str]]:
    return [(job.volume, job.input_type, job.input_path) for job in service.table.changed_since(0)]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_each_volume_becomes_a_job_and_all_ids_are_answered(world, kind):
    path = laid(world.incoming, ["S/v01/1.png", "S/v02.cbz", "S/v10/1.png"], kind).name
    reply = ask(world.client, path, kind)
    answer = reply.json()
    assert reply.status == 202 and set(answer) == {"jobId", "jobIds"}
    made = [world.service.table.get(job) for job in answer["jobIds"]]
    assert answer["jobId"] == made[0].id and reply.headers["location"] == f"/jobs/{made[0].id}"
    assert [(job.title, job.volume) for job in made] == [("作品名", n) for n in ("01", "02", "10")]
    assert [(job.input_type, job.input_path) for job in made] == [
        (kind, f"{path}/S/v01"), ("zip", f"{path}/S/v02.cbz"), (kind, f"{path}/S/v10")
    ]  # fmt: skip
    assert {job.params.split for job in made} == {"volumes"}


def test_one_volume_is_one_job_under_the_name_it_was_given(world):
    laid(world.incoming, ["1.png", "2.png"], "zip")
    answer = ask(world.client, "in.zip", "zip").json()
    assert answer["jobIds"] == [answer["jobId"]] and rows(world.service) == [("all", "zip", "in.zip")]


def test_without_it_an_answer_and_a_report_are_what_they_always_were(world):
    laid(world.incoming, ["v1/1.png", "v2/1.png"], "zip")
    reply = ask(world.client, "in.zip", "zip", params={"split": "none"})
    assert set(reply.json()) == {"jobId"} and rows(world.service) == [("all", "zip", "in.zip")]


def test_a_repeated_key_answers_the_same_ids_also_when_the_input_is_gone(world):
    place = laid(world.incoming, ["v1/1.png", "v2/1.png"], "zip")
    first = ask(world.client, "in.zip", "zip", "k").json()
    other = ask(world.client, "in.zip", "zip", "k2").json()
    place.unlink()
    assert ask(world.client, "in.zip", "zip", "k").json() == first != other
    assert ask(world.client, "in.zip", "zip", "k", title="another").status == 409
    assert len(rows(world.service)) == 4


def test_a_repeated_key_makes_anew_what_was_deleted_of_several_and_nothing_else(world):
    laid(world.incoming, ["v1/1.png", "v2/1.png", "v3/1.png"], "zip")
    first = ask(world.client, "in.zip", "zip", "k").json()["jobIds"]
    for gone in (0, 2):
        world.client.call("DELETE", f"/jobs/{first[gone]}")
        again = ask(world.client, "in.zip", "zip", "k").json()["jobIds"]
        assert [old == new for old, new in zip(first, again, strict=True)] == [n != gone for n in range(3)]
        assert [world.service.table.get(job).volume for job in again] == ["1", "2", "3"]
        first = again
    laid(world.incoming, ["v1/1.png"], "zip")  # another input of this name
    world.client.call("DELETE", f"/jobs/{first[0]}")
    assert ask(world.client, "in.zip", "zip", "k").json()["jobIds"] == first[1:]


def test_jobs_whose_keys_do_not_count_them_are_found_although_their_input_is_gone(world):
    """As they were made before one key told how many."""
    place, table = laid(world.incoming, ["v1/1.png", "v2/1.png"], "zip"), world.service.table
    first = ask(world.client, "in.zip", "zip", "k").json()
    for job, key in zip(first["jobIds"], ("k", "k\n2"), strict=True):
        assert table.change(table.get(job), idempotency_key=key)
    place.unlink()
    assert ask(world.client, "in.zip", "zip", "k").json() == first


def test_a_volume_that_is_resumed_by_its_upload_s_path_stays_that_volume(world):
    """A client that resumes with the input it submitted knows no other path."""
    laid(world.incoming, ["v1/1.png", "v2/1.png"], "zip")
    job = ask(world.client, "in.zip", "zip").json()["jobIds"][0]
    world.client.call("POST", f"/jobs/{job}/cancel")
    body = {"inputPath": "incoming/in.zip", "inputType": "zip"}
    assert world.client.call("POST", f"/jobs/{job}/resume", body).status == 200
    resumed = world.service.table.get(job)
    assert (resumed.state, resumed.input_type, resumed.input_path) == (jobs.PENDING, "zip", "in.zip/v1")


@pytest.mark.parametrize(
    ("names", "change", "fault"),
    [
        (["cover.png", "v1/1.png"], {}, "input.path"),
        (["v1/1.png", "a\x01b/1.png"], {}, "input.path"),
        (["v1/1.png", "../../out/1.png"], {}, "input.path"),
        (["v1/1.png"], {"manifest": {"files": []}}, "manifest"),
        (["v1/1.png"], {"params": {"split": "pages"}}, "params.split"),
        (["v1/1.png"], {"params": {"split": None}}, "params.split"),
    ],
)
def test_what_can_not_be_split_makes_no_job_at_all(world, names, change, fault):
    laid(world.incoming, names, "zip")
    reply = ask(world.client, "in.zip", "zip", **change)
    assert reply.status == 422 and fault in reply.faults()
    assert rows(world.service) == []


def test_an_archive_that_is_none_is_refused_and_so_is_a_path_that_is_not_there(world):
    (world.incoming / "in.zip").write_bytes(b"no zip")
    for path in ("in.zip", "gone.zip", "in.zip/v1"):
        assert ask(world.client, path, "zip").status == 422
    assert rows(world.service) == []


def test_a_volume_that_can_not_fit_refuses_all(world, monkeypatch):
    laid(world.incoming, ["v1/1.png", "v2/1.png"], "folder")
    world.service.dispatcher.reserve_bytes = 1 << 60
    monkeypatch.setattr(world.service.api, "_check_room", lambda *_: None)
    assert ask(world.client, "in", "folder").problem().code == "NO_ROOM"
    assert rows(world.service) == []


def test_a_split_upload_is_not_taken_again_by_the_watch(world):
    (world.incoming / "n.zip").write_bytes(ONE)  # whose name is the other's end, and which nobody submits
    laid(world.incoming, ["v1/1.png", "v2/1.png"], "zip")
    ask(world.client, "in.zip", "zip")
    now_s, service = [0.0], world.service
    looker = watch.Watch(
        service.table, service.config.layout, Limits(), 30.0, Params(), None, lambda: None, lambda: now_s[0]
    )
    looker.look()
    now_s[0] += 30
    looker.look()
    assert rows(service) == [("1", "zip", "in.zip/v1"), ("2", "zip", "in.zip/v2"), ("1", "zip", "n.zip")]


def test_the_watch_has_a_rule_of_its_own_and_refuses_another(tmp_path):
    config = settings.Config(storage_root=tmp_path, port=0, watch_s=1.0, watch_params={"split": "volumes"})
    with pytest.raises(settings.ConfigError, match="split"):
        server.Service(config)
