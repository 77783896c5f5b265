"""What a volume is predicted to take, by made-up rates; by the real worker: tests/test_preview.py."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import pytest
from serving import PARAMS, PLAN, finished, png, running, still

import jobs
import server
from engine.survey import Tally
from messages import PageDone, Params, Workload
from work import predict, submissions
from work.predict import Measured, Sample

# 1 s and 1 MB for a page of a megapixel at scale 2, 2 s for what is done once.
TEN = Measured(Workload(10, 10_000_000, 40_000_000, 5_000_000), 12.0, 10.0, 10_000_000)


def test_a_like_volume_is_predicted_from_its_pixels_and_the_rest_is_counted_once():
    rate = predict.of_volumes([TEN])
    assert rate.seconds(Workload(100, 100_000_000, 400_000_000)) == pytest.approx(102)
    assert rate.size_bytes(Workload(100, 100_000_000, 400_000_000)) == 100_000_000
    assert (rate.pages, rate.basis) == (10, "volumes")


def test_until_it_is_staged_a_volume_takes_what_it_took_and_not_what_another_did():
    cold = replace(TEN, seconds=20.0, staged_s=8.0)
    load = Workload(100, 100_000_000, 400_000_000)
    assert predict.of_volumes([cold]) == predict.of_volumes([TEN])
    assert predict.of_volumes([cold]).seconds(load, staged_s=0.5) == pytest.approx(102.5)


def test_pages_that_were_computed_side_by_side_are_not_added_up():
    rate = predict.of_volumes([replace(TEN, page_seconds=40.0)])
    assert rate.seconds(Workload(10, 10_000_000, 40_000_000)) == pytest.approx(12)


def test_several_volumes_count_by_their_pages_and_old_ones_are_left_aside():
    slow = Measured(Workload(500, 500_000_000, 2_000_000_000), 1002.0, 1000.0, 10**9)
    assert predict.of_volumes([slow, TEN]).pages == 500
    both = predict.of_volumes([TEN, slow])
    assert (both.pages, both.second_per_pixel) == (510, pytest.approx(1010 / 510e6))


def test_pages_that_are_large_enough_cost_their_bytes_and_no_time():
    wanted = Workload(0, 0, 0, 0, carried_bytes=777)
    assert predict.of_volumes([TEN]).size_bytes(wanted) == 777
    carried = replace(TEN, workload=replace(TEN.workload, carried_bytes=2_000_000))
    assert predict.of_volumes([carried]).size_bytes(Workload(1, 1, 4_000_000)) == 800_000


def test_other_files_and_pages_in_the_cache_cost_their_bytes_and_tell_nothing_of_computed_ones():
    wanted = Workload(1, 1, 4_000_000, 0, carried_bytes=500, other_bytes=70, cached=2)
    assert predict.of_volumes([TEN]).size_bytes(wanted) == 1_000_570
    with_others = replace(TEN, size_bytes=TEN.size_bytes + 99, workload=replace(TEN.workload, other_bytes=99))
    assert predict.of_volumes([with_others]) == predict.of_volumes([TEN])


def test_a_previews_page_predicts_time_by_pixels_and_size_by_how_full_the_others_are():
    samples = [Sample(3.0, 1_000_000, 4_000_000, 900_000, 300_000), Sample(2.0, 1_000_000, 4_000_000, 0, 0)]
    rate = predict.of_samples(samples)
    load = Workload(20, 20_000_000, 80_000_000, 6_000_000)
    assert (rate.seconds(load), rate.basis) == (pytest.approx(40), "preview")
    assert rate.size_bytes(load) == rate.size_bytes(replace(load, source_bytes=0)) == 18_000_000
    fuller = rate.size_bytes(replace(load, source_bytes=12_000_000))
    assert fuller == pytest.approx(18_000_000 * 2**predict.FOLLOWS)
    part = predict.of_samples(samples[1:])  # of a page, that tells no bytes before
    assert part.size_bytes(load) == 0 and part.density is None


def test_decoding_and_encoding_beside_a_card_cost_nothing_until_they_are_slower(monkeypatch):
    monkeypatch.setattr(predict.os, "cpu_count", lambda: 2)
    done = PageDone("k", 0, 1, "1.jpg", "", 9, 2, 2, "L", 3.0, input_pixels=1, device_s=2.0)
    seconds = {
        device: predict.sample_of(done, replace(PLAN, device=device), 5).seconds for device in ("cpu", "cuda")
    }
    assert seconds == {"cpu": 2.5, "cuda": 2.0}
    slow = replace(done, seconds=12.0)
    assert predict.sample_of(slow, replace(PLAN, device="cuda"), 5).seconds == 5.0


def test_nothing_known_predicts_nothing_and_says_so():
    assert predict.of_volumes([]) is None and predict.of_samples([]) is None
    assert predict.to_json(predict.forecast(TEN.workload, None)) is None


def test_the_error_is_how_far_too_high_it_was():
    assert predict.error_percent(125, 100) == 25.0 and predict.error_percent(80, 100) == -20.0
    assert predict.error_percent(1, 0) is None


# ---------------------------------------------------------------- kept with jobs
def ended(
    service: server.Service,
    after_s: float,
    attempts: int = 1,
    cached: Collection[int] = (),
    workload: Workload = TEN.workload,
    held: bool = False,
) -> jobs.Job:
    """A job with ten pages that measured TEN, after_s from its start to its end; it was staged at once."""
    job = running(service)
    for _ in range(1, attempts):
        jobs.lose_worker(service.table, job, 1000.0)
        job = jobs.claim(service.table, 1000.0)
    rates = service.dispatcher.rates
    service.table.clock = lambda: job.started_s
    job = rates.begin(job, workload)
    service.table.clock = lambda: job.started_s + after_s
    pages = [
        jobs.Page(job.id, n, "p", "p", "", 500_000, None, "p", "upscaled", width=2000, height=2000,
                  model="realesr-animevideov3", seconds=1.0, bytes=1_000_000)
        for n in range(10)
    ]  # fmt: skip
    facts = rates.end(job, pages, TEN.size_bytes, cached, held)
    return jobs.advance(service.table, job, "finish", job.started_s + after_s, **facts)


@pytest.fixture
def service(tmp_path):
    with still(tmp_path) as service:
        yield service


def test_a_second_volume_is_predicted_and_the_error_told(service, caplog):
    caplog.set_level("INFO", "predict")
    first, second = ended(service, 12.0), ended(service, 15.0)
    assert predict.measured_of(jobs.parsed(first.forecast)) == TEN
    assert predict.to_json(jobs.parsed(first.forecast)) is None
    told = submissions.to_state(second, service.config.layout)["prediction"]
    assert told == {
        "minutes": 0.2, "megabytes": 10.0, "basis": "volumes", "basisPages": 10, "actualMinutes": 0.25,
        "actualMegabytes": 10.0, "minutesErrorPercent": -20.0, "megabytesErrorPercent": 0.0,
    }  # fmt: skip
    assert "predicted 0.20 min and 10.00 MB from 10 pages; it was 0.25 min (-20.0%)" in caplog.text


def test_what_was_measured_outlives_the_service(tmp_path):
    with still(tmp_path) as service:
        job = ended(service, 12.0)
    with still(tmp_path) as service:
        rate = service.dispatcher.rates.rate(job.params, job.plan)
    assert rate == predict.of_volumes([TEN])


@pytest.mark.parametrize("broken", [{"attempts": 2}, {"held": True}])
def test_a_volume_that_lay_still_in_between_measures_no_time(service, broken):
    job = ended(service, 5000.0, **broken)
    told = jobs.parsed(job.forecast)
    assert (told["actualSeconds"], told["measured"], told["actualBytes"]) == (None, None, TEN.size_bytes)
    assert service.dispatcher.rates.rate(job.params, job.plan) is None


def test_a_clock_that_was_set_back_makes_no_volume_that_took_less_than_nothing(service):
    job = ended(service, -3.0)
    assert jobs.parsed(job.forecast)["measured"] is None
    assert service.dispatcher.rates.rate(job.params, job.plan) is None


def test_pages_from_the_cache_are_measured_neither_as_fast_nor_as_small(service):
    """Eight of ten, and those that were computed took a second each."""
    known = Workload(2, 2_000_000, 8_000_000, 1_000_000, carried_bytes=8_000_000, cached=8)
    job = ended(service, 4.0, cached=range(8), workload=known)
    measured = predict.measured_of(jobs.parsed(job.forecast))
    assert measured.workload == known and measured.busy_s == 2.0
    rate = service.dispatcher.rates.rate(job.params, job.plan)
    assert (rate.second_per_pixel, rate.pages) == (pytest.approx(1e-6), 2)
    assert rate.byte_per_pixel == 0.25
    whole = ended(service, 1.0, cached=range(10), workload=Workload(carried_bytes=TEN.size_bytes, cached=10))
    assert service.dispatcher.rates.rate(whole.params, whole.plan) == rate


def test_no_error_is_told_where_pages_came_from_the_cache_that_nobody_expected_there(service, caplog):
    caplog.set_level("INFO", "predict")
    ended(service, 12.0)
    told = submissions.to_state(ended(service, 7.0, cached=range(5)), service.config.layout)["prediction"]
    assert (told["minutes"], told["actualMinutes"], told["minutesErrorPercent"]) == (0.2, 0.117, None)
    assert "it was 0.12 min with pages of other jobs" in caplog.text
    known = Workload(5, 5_000_000, 20_000_000, 2_500_000, 5_000_000, cached=5)
    job = ended(service, 7.0, cached=range(5), workload=known)
    assert submissions.to_state(job, service.config.layout)["prediction"]["minutesErrorPercent"] == 0.0


@pytest.mark.parametrize(
    "change", [{"scale": 3}, {"output_format": "png"}, {"jpeg_quality": 80}, {"denoise": "high"}]
)
def test_other_settings_are_other_work(service, change):
    job, rates = ended(service, 12.0), service.dispatcher.rates
    like = {"device": "cpu", "tile_size": 64, "container": "cbz", "split": "volumes"}
    assert rates.rate(replace(job.params, **like), job.plan).pages == 10
    assert rates.rate(replace(job.params, **change), job.plan) is None
    for plan in ({"precision": "bf16"}, {"device": "cuda"}, {"weights_sha256": "1" * 64}):
        assert rates.rate(job.params, replace(job.plan, **plan)) is None


def test_volumes_count_for_more_than_previews_and_previews_are_bounded(service):
    rates, sample = service.dispatcher.rates, Sample(3.0, 10**6, 4 * 10**6, 9, 9)
    for n in range(2 * predict.KINDS_KEPT):
        rates.remember(replace(PARAMS, jpeg_quality=n), PLAN, sample)
    assert len(rates._samples) == predict.KINDS_KEPT
    assert rates.rate(replace(PARAMS, jpeg_quality=n), PLAN).basis == "preview"
    job = ended(service, 12.0)
    rates.remember(job.params, job.plan, sample)
    assert rates.rate(job.params, job.plan).basis == "volumes"


def test_a_job_without_a_forecast_ends_as_before(service):
    job = finished(service)
    assert submissions.to_state(job, service.config.layout)["prediction"] is None


def test_pages_that_no_network_made_cost_their_bytes_and_do_not_count_as_computed():
    told = predict.forecast(Workload(2, 2_000_000, 6_000_000, 900), None)
    page = jobs.Page("job", 1, "1", "1", "", 300, None, "1", "upscaled", width=1000, height=2000, bytes=100,
                     seconds=2.0, model="m")  # fmt: skip
    reduced = replace(page, n=3, model=None, seconds=0.1)
    seen = predict.measure(told, [page, replace(page, n=2), reduced], 9.0, 500)
    assert (seen.workload.pages, seen.workload.input_pixels) == (2, 2_000_000)
    assert (seen.workload.output_pixels, seen.page_seconds) == (6_000_000, pytest.approx(4.1))


def test_a_page_that_a_screen_reduces_is_counted_by_what_becomes_of_it():
    head = png(1600, 2400)
    for params, computed, output_pixels, carried in (
        (Params(profile="kobo-libra", target_width=1264, target_height=1680), 0, 1120 * 1680, 0),
        (Params(target_width=1264, target_height=1680), 0, 0, 9000),
        (Params(scale=2), 1, 3200 * 4800, 0),
    ):
        tally = Tally(params)
        tally.add(head, 9000)
        counted = tally.computed, tally.output_pixels, tally.carried_bytes
        assert counted == (computed, output_pixels, carried)
