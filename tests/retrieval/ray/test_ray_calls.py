"""Whom a call asks, and when it gives up, with a Ray that is made up."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from twotower.engine_config import Engine
from twotower.retrieval.exact import ExactConfig
from twotower.retrieval.ray import cluster as ray_cluster
from twotower.retrieval.ray.cluster import Replica, Shards, Unavailable
from twotower.settings import ConfigError

NEVER = object()  # an answer that does not come


class RayError(Exception):
    pass


class ActorDiedError(RayError):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__("a traceback of Ray's")
        self.cause = cause


class Actor:
    """Answers by a function of the number of the call; an exception is raised by `get`.

    Beside its work it says what `beside` is.
    """

    beside: Any = NEVER

    def __init__(self, name: str, answers: Callable[[int], Any]) -> None:
        self.name = name
        self.calls = itertools.count()
        self.search = SimpleNamespace(remote=lambda: (self, answers(next(self.calls))))
        self.hello = SimpleNamespace(options=self.options)
        self.__ray_ready__ = SimpleNamespace(remote=lambda: (self, True))

    def options(self, concurrency_group: str) -> SimpleNamespace:
        assert concurrency_group == ray_cluster.BESIDE
        return SimpleNamespace(remote=lambda: (self, self.beside))


class Ray:
    """References are pairs of an actor and what it answers."""

    exceptions = SimpleNamespace(RayError=RayError, ActorDiedError=ActorDiedError)

    def wait(self, references: Any, timeout: float) -> Any:
        ready = [reference for reference in references if reference[1] is not NEVER]
        return ready, []

    def get(self, reference: Any) -> Any:
        if isinstance(reference[1], Exception):
            raise reference[1]
        return reference[1]

    def nodes(self) -> list[dict[str, bool]]:
        return [{"Alive": True}, {"Alive": False}]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "PAUSE", 0.001)
    monkeypatch.setattr(ray_cluster, "HEDGE", 0.002)


class Clock:
    """A time that passes by sleeping alone, so that a busy machine changes nothing."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(ray_cluster, "time", Clock())
    return ray_cluster.time  # type: ignore[return-value]


def shards(*replicas: Callable[[int], Any], patience: float = 0.05) -> tuple[Shards, list[str]]:
    """One shard whose replicas answer so; and the actors that are started, by name."""
    started: list[str] = []

    def starter(number: int, answers: Callable[[int], Any]) -> Callable[[], Actor]:
        def start() -> Actor:
            started.append(f"{number}")
            return Actor(f"{number}", answers)

        return start

    made = Shards.__new__(Shards)
    made._ray = Ray()
    made._config = ExactConfig(engine=Engine.ray, patience=patience, replicas=len(replicas))
    made._turn = itertools.count()
    made._replicas = [[Replica(starter(*pair)) for pair in enumerate(replicas)]]
    return made, started


def ask(made: Shards, working: bool = False) -> Any:
    return made.call("search", [()], working=working)[0]


def test_replicas_take_turns() -> None:
    made, _ = shards(lambda n: f"a{n}", lambda n: f"b{n}", patience=1)
    made._replicas *= 2
    answers = [made.call("search", [(), ()], working=False) for _ in range(4)]
    assert answers == [["a0", "a1"], ["b0", "b1"], ["a2", "a3"], ["b2", "b3"]]


def test_a_lost_replica_costs_a_call_of_another() -> None:
    made, started = shards(lambda n: RayError("gone"), lambda n: "right")
    assert [ask(made) for _ in range(5)] == ["right"] * 5
    assert started == ["0", "1"]


def test_one_that_does_not_answer_is_asked_beside_another() -> None:
    made, _ = shards(lambda n: NEVER, lambda n: "right")
    assert [ask(made) for _ in range(3)] == ["right"] * 3
    assert made._replicas[0][0].checking is not None


def test_what_is_there_again_is_asked_again() -> None:
    made, _ = shards(lambda n: RayError("gone") if n < 3 else "back")
    assert ask(made) == "back"


def test_one_that_ray_gives_up_is_started_again() -> None:
    calls = itertools.count()
    made, started = shards(lambda n: ActorDiedError("dead") if next(calls) < 2 else "back")
    assert ask(made) == "back"
    assert started == ["0", "0", "0"]


@pytest.mark.parametrize("answer", [RayError("gone\nfar"), RayTaskError(OSError("gone")), NEVER])
def test_no_answer_in_time_is_a_refusal(answer: Any) -> None:
    made, _ = shards(lambda n: answer, lambda n: answer)
    reason = "no actor" if answer is NEVER else "gone"
    words = rf"shard 1 of 1 was not there for 0.05 s, .* \({reason}\); .* has 1 nodes alive"
    with pytest.raises(Unavailable, match=words):
        ask(made)


def test_work_may_take_long_once_it_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "AT_WORK", 0.01)
    made, _ = shards(lambda n: "done")
    waits = itertools.count()

    def wait(references: Any, timeout: float) -> Any:
        ready = list(references) if next(waits) > 200 else []
        ray_cluster.time.sleep(timeout)
        return ready, []

    monkeypatch.setattr(made._ray, "wait", wait, raising=False)
    assert ask(made, working=True) == "done"


@pytest.mark.parametrize("beside", [None, NEVER, RayError("gone")])
def test_a_search_may_take_longer_than_patience_while_its_replica_is_there(
    beside: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Actor, "beside", beside)

    def wait(references: Any, timeout: float) -> Any:
        ready = [found for found in references if found[1] not in (NEVER, "found")]
        if clock.now > 100.15:  # three times the patience
            ready = list(references)
        clock.sleep(timeout)
        return ready, []

    made, _ = shards(lambda n: "found")
    monkeypatch.setattr(made._ray, "wait", wait, raising=False)
    if beside is None:
        assert ask(made) == "found"
    else:
        with pytest.raises(Unavailable, match="was not there for 0.05 s"):
            ask(made)


@pytest.mark.parametrize("working", [True, False])
@pytest.mark.parametrize("error", [RayTaskError(MemoryError()), RayError("MemoryError")])
def test_what_fails_at_its_work_again_and_again_is_refused(
    error: Any, working: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Actor, "beside", None)
    monkeypatch.setattr(ray_cluster, "AT_WORK", 0.01)
    made, _ = shards(lambda n: error, patience=1)
    asked: dict[int, Any] = {}

    def wait(references: Any, timeout: float) -> Any:
        first = [asked.setdefault(id(found), (clock.now, found))[0] for found in references]
        pairs = zip(references, first, strict=True)
        ready = [found for found, at in pairs if found[1] is not error or clock.now - at > 0.03]
        clock.sleep(timeout)
        return ready, []

    monkeypatch.setattr(made._ray, "wait", wait, raising=False)
    with pytest.raises(Unavailable, match=r"shard 1 of 1 failed 3 times .* \(MemoryError\); see"):
        ask(made, working)


def test_what_an_actor_refuses_is_told_in_its_words() -> None:
    made, _ = shards(lambda n: RayTaskError(ConfigError("use another folder")), lambda n: "right")
    with pytest.raises(ConfigError, match="^use another folder$"):
        ask(made)
