from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from tests.data.pictures import png
from tests.data.served import Answer, Served, served
from twotower.data import downloads
from twotower.data.downloads import Download, Fetcher, State, download_all, read_record
from twotower.settings import ConfigError

PICTURE = png((1, 2, 3))


def jobs(server: Served, folder: Path, keys: Sequence[int]) -> list[Download]:
    return [Download(key, f"{server.url}/{key}", folder / f"a/{key}.jpg") for key in keys]


def fetcher(**settings: float) -> Fetcher:
    return Fetcher(**{"connections": 2, "tries": 3, "pause": 0.0, "timeout": 5.0, **settings})


def test_what_comes_of_each_picture(tmp_path: Path) -> None:
    answers = {
        "/1": [Answer(200, PICTURE)],
        "/2": [Answer(404)],
        "/3": [Answer(503), Answer(429, headers=(("Retry-After", "0"),)), Answer(200, PICTURE)],
        "/4": [Answer(500)],
        "/5": [Answer(200, b"<html>no picture</html>")],
        "/6": [Answer(200, PICTURE, lost=5), Answer(200, PICTURE)],
        "/7": [Answer(302, headers=(("Location", "/photo_unavailable.png"),))],
        "/photo_unavailable.png": [Answer(200, PICTURE)],
        "/8": [Answer(418)],
    }
    record = tmp_path / "downloads.tsv"
    with served(answers) as server:
        counts = download_all(jobs(server, tmp_path, range(1, 9)), 8, record, fetcher())
        assert counts == {State.ok: 3, State.gone: 3, State.failed: 2}
        assert (server.asked["/3"], server.asked["/4"], server.asked["/8"]) == (3, 3, 1)
        assert all(agent.startswith("twotower") for agent in server.agents)
    assert sorted(record.read_text().splitlines()) == [
        "1\tok\t",
        "2\tgone\tHTTP 404",
        "3\tok\t",
        "4\tfailed\tHTTP 500",
        "5\tgone\tnot a picture",
        "6\tok\t",
        "7\tgone\tHTTP 200",
        "8\tfailed\tHTTP 418",
    ]
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["1.jpg", "3.jpg", "6.jpg"]
    assert (tmp_path / "a/6.jpg").read_bytes() == PICTURE


def test_a_second_run_asks_for_what_is_left_alone(tmp_path: Path) -> None:
    record = tmp_path / "downloads.tsv"
    answers = {f"/{key}": [Answer(200, PICTURE)] for key in (1, 3, 5)}
    answers["/4"] = [Answer(500)]
    with served(answers) as server:
        download_all(jobs(server, tmp_path, [1, 2, 4]), 3, record, fetcher(tries=1))
        with record.open("a") as file:
            file.write("5\to")  # a killed run
        server.asked.clear()
        answers["/4"] = [Answer(200, PICTURE)]
        counts = download_all(jobs(server, tmp_path, [1, 2, 3, 4, 5]), 5, record, fetcher())
        assert server.asked == {"/3": 1, "/4": 1, "/5": 1}
    assert counts == {State.ok: 4, State.gone: 1}
    again, settled = read_record(record)
    assert again == {State.ok: 4, State.gone: 1, State.failed: 0}
    assert settled.tolist() == [1, 2, 3, 4, 5]


def test_a_picture_that_is_there_is_not_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jpg").touch()
    with served({}) as server:
        counts = download_all(jobs(server, tmp_path, [1]), 1, tmp_path / "d.tsv", fetcher())
        assert counts == {State.ok: 1} and not server.asked


def test_never_more_connections_than_allowed_and_a_pace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(downloads.time, "sleep", waits.append)
    monkeypatch.setattr(downloads.time, "monotonic", lambda: 100.0)
    answers = {f"/{key}": [Answer(200, PICTURE)] for key in range(12)}
    with served(answers) as server:
        polite = fetcher(connections=3, per_second=4.0)
        assert download_all(jobs(server, tmp_path, range(12)), 12, tmp_path / "d.tsv", polite) == {
            State.ok: 12
        }
        assert server.most_at_once <= 3
    assert sorted(waits) == [n / 4 for n in range(1, 12)]


def test_all_wait_when_a_server_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(downloads.time, "sleep", waits.append)
    monkeypatch.setattr(downloads.time, "monotonic", lambda: 100.0)
    answers = {f"/{key}": [Answer(200, PICTURE)] for key in range(4)}
    answers["/1"] = [Answer(503, headers=(("Retry-After", "7"),)), Answer(200, PICTURE)]
    answers["/3"] = [Answer(429, headers=(("Retry-After", "3600"),)), Answer(200, PICTURE)]
    with served(answers) as server:
        polite = fetcher(connections=1, pause=0.5)
        counts = download_all(jobs(server, tmp_path, range(4)), 4, tmp_path / "d.tsv", polite)
    assert counts == {State.ok: 3, State.failed: 1}
    assert waits == [0.5, 7.0, 7.0, 7.0]  # a pause, the second try, and the pictures after it


def test_how_long_a_server_asks_to_wait() -> None:
    later = datetime.now(UTC) + timedelta(seconds=60)
    assert downloads._seconds("60") == 60
    assert 50 < downloads._seconds(format_datetime(later, usegmt=True)) <= 60
    assert downloads._seconds("") == downloads._seconds("soon") == 0


def test_an_address_that_is_none_is_not_tried_again(tmp_path: Path) -> None:
    addresses = ["", "x.jpg", "ftp://x/y.jpg", "http://"]
    wrong = [Download(key, url, tmp_path / str(key)) for key, url in enumerate(addresses)]
    assert {fetcher(pause=99.0).fetch(job).state for job in wrong} == {State.gone}


def test_a_server_that_gives_nothing_is_not_taken_for_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "ROUND", 2)
    record = tmp_path / "d.tsv"
    answers = {f"/{key}": [Answer(200, PICTURE)] for key in range(4)}
    with served(answers) as server, pytest.raises(ConfigError) as caught:
        download_all(jobs(server, tmp_path, range(12)), 12, record, fetcher())
    assert str(caught.value) == (
        f"none of 4 pictures could be fetched, for example {server.url}/4 (HTTP 404); check the "
        "network and data.url, and run it again"
    )
    assert len(record.read_text().splitlines()) == 4
    record = tmp_path / "e.tsv"
    with pytest.raises(ConfigError, match=r"none of 1 pictures .* \(ConnectionError\)"):
        download_all(jobs(server, tmp_path, [99]), 1, record, fetcher())
    with served({"/9": [Answer(403)]}) as server, pytest.raises(ConfigError, match="none of 1"):
        download_all(jobs(server, tmp_path, [9]), 1, record, fetcher())  # a proxy, perhaps
    assert record.read_text() == ""


def test_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with (
        served({"/1": [Answer(200, PICTURE)]}) as server,
        pytest.raises(ConfigError, match=r"cannot be written: .*; run it again to go on from here"),
    ):
        download_all(jobs(server, tmp_path, [1]), 1, tmp_path / "d.tsv", fetcher())
