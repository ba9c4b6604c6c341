"""Actors of a Ray cluster, one or more a shard; where one is lost, another is asked."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from twotower.config import IndexConfig
from twotower.retrieval.engine import in_this_process
from twotower.retrieval.ray.connection import connect
from twotower.retrieval.ray.shard import Shard
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

HEDGE = 3.0  # seconds without an answer, after which another replica is asked as well
PAUSE = 0.2  # seconds between two tries where no replica is there
AT_WORK = 5.0  # seconds after which a long call that has not failed is being worked at
FAILURES = 3  # of a call that was being worked at, after which it is not tried again
BESIDE = "checks"  # the thread of an actor that answers while another one works


class Unavailable(ConfigError):
    """A shard was not reached in time; the same search may well succeed later."""


class Replica:
    """One actor, and whether it is to be trusted.

    Attributes:
        checking: a call whose answer shows that the actor is there again; None while it is.
    """

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start = start
        self.actor = start()
        self.checking: Any = None

    def again(self) -> None:
        """Put a new actor in the place of one that Ray has given up."""
        self.actor = self._start()


class Shards:
    """The actors of an index; a call reaches one replica of every shard."""

    def __init__(self, config: IndexConfig, dim: int, folders: Sequence[Path]) -> None:
        self._ray = connect(config.address)
        self._config = config
        self._turn = itertools.count()
        self._groups = [self._group() for _ in folders]
        self._replicas = [
            [
                Replica(self._starter(dim, folder, group, number))
                for number in range(config.replicas)
            ]
            for folder, group in zip(folders, self._groups, strict=True)
        ]
        try:
            self.call("hello", [()] * len(folders), working=False)
        except BaseException:
            self.close()
            raise

    def _group(self) -> Any:
        """Places for the replicas of a shard, no two of them on one node."""
        place = {"CPU": self._config.shard_cpus or 0.001}
        return self._ray.util.placement_group(
            [place] * self._config.replicas, strategy="STRICT_SPREAD"
        )

    def _starter(self, dim: int, folder: Path, group: Any, number: int) -> Callable[[], Any]:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        options = {
            "num_cpus": self._config.shard_cpus,
            "max_restarts": -1,  # on another node if its own is lost
            "max_task_retries": 0,  # calls are tried again here, on other replicas and until a time
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=number
            ),
        }
        actor = self._ray.remote(concurrency_groups={BESIDE: 1})(Shard).options(**options)
        return lambda: actor.remote(in_this_process(self._config), dim, folder)

    def close(self) -> None:
        """End the actors and give back their places."""
        if not self._ray.is_initialized():
            return  # the actors end with the connection
        with suppress(Exception):  # the cluster may be gone
            for replica in itertools.chain.from_iterable(self._replicas):
                self._ray.kill(replica.actor)
            for group in self._groups:
                self._ray.util.remove_placement_group(group)

    def call(self, method: str, arguments: Sequence[Sequence[Any]], *, working: bool) -> list[Any]:
        """Call a method on one replica of every shard, each with its arguments; the answers.

        A shard that does not answer is asked of its other replicas and, until `index.patience` is
        over, of what Ray puts in their place. A replica that works may take any time.

        Args:
            working: no other replica is asked meanwhile; a call that has not failed for a while is
                worked at, without further signs.

        Raises:
            Unavailable: no replica of a shard was there in time, or several failed at their work.
            ConfigError: what an actor raised.
        """
        turn = next(self._turn)
        calls = [
            _Call(self._ray, replicas, method, args, turn, working)
            for replicas, args in zip(self._replicas, arguments, strict=True)
        ]
        for call in calls:
            call.ask()
        waiting = list(calls)
        while waiting:
            asked = [ref for call in waiting for ref in call.asked]
            if asked:
                self._ray.wait(asked, timeout=PAUSE)
            else:
                time.sleep(PAUSE)
            waiting = [call for call in waiting if not call.done()]
            for call in waiting:
                if call.failures == FAILURES:
                    raise Unavailable(
                        f"shard {calls.index(call) + 1} of {len(calls)} failed {FAILURES} times "
                        f"at its work ({call.reason}); see that its nodes have memory enough"
                    )
                if call.lost_for() > self._config.patience:
                    raise Unavailable(self._refusal(calls.index(call), call.reason))
        return [call.answer for call in calls]

    def tell(self, method: str, arguments: Sequence[Sequence[Any]]) -> None:
        """Call a method on every replica, and wait for none."""
        for replicas, args in zip(self._replicas, arguments, strict=True):
            for replica in replicas:
                getattr(replica.actor, method).remote(*args)

    def _refusal(self, number: int, reason: str) -> str:
        nodes = sum(node["Alive"] for node in self._ray.nodes())
        return (
            f"shard {number + 1} of {len(self._replicas)} was not there for "
            f"{self._config.patience:g} s, so there is no whole answer ({reason or 'no actor'}); "
            f"the Ray cluster has {nodes} nodes alive, of which "
            f"index.replicas={self._config.replicas} must be different ones; wait longer with "
            "index.patience"
        )


class _Call:
    """A call of one shard, until one of its replicas has answered."""

    def __init__(
        self,
        ray: Any,
        replicas: Sequence[Replica],
        method: str,
        arguments: Sequence[Any],
        turn: int,
        working: bool,
    ) -> None:
        self._ray = ray
        self._replicas = replicas
        self._method = method
        self._arguments = arguments
        self._turn = turn
        self._working = working
        self.asked: dict[Any, Replica] = {}
        self.answer: Any = None
        self.reason = ""
        self.failures = 0
        self._at_work = False
        self._signs: dict[Replica, Any] = {}
        self._since = self._last = time.monotonic()

    def ask(self) -> None:
        """Ask the next replica that is not asked already, rather one that is known to be there."""
        turned = [
            self._replicas[(self._turn + place) % len(self._replicas)]
            for place in range(len(self._replicas))
        ]
        free = [replica for replica in turned if replica not in self.asked.values()]
        there = [replica for replica in free if self._is_there(replica)]
        for replica in (there or free)[:1]:
            reference = getattr(replica.actor, self._method).remote(*self._arguments)
            self.asked[reference] = replica
        self._turn += 1
        self._last = time.monotonic()

    def lost_for(self) -> float:
        """Seconds for which there has been no answer; none while an actor works as it may."""
        now = time.monotonic()
        if self._working:
            works = bool(self.asked) and now - self._last > AT_WORK
        else:
            works = now - self._since > PAUSE and self._signs_of_life()
        if works:
            self._since, self._at_work = now, True
        return now - self._since

    def _signs_of_life(self) -> bool:
        """Whether an actor that is asked has answered beside its work; it is asked to do so again.

        One that is lost, has no node or is not made yet does not.
        """
        found = False
        for replica in self.asked.values():
            sign = self._signs.get(replica)
            if sign is not None:
                ready, _ = self._ray.wait([sign], timeout=0)
                if not ready:
                    continue
                with suppress(self._ray.exceptions.RayError):
                    self._ray.get(sign)
                    found = True
            beside = replica.actor.hello.options(concurrency_group=BESIDE)
            self._signs[replica] = beside.remote()
        return found

    def done(self) -> bool:
        """Look for answers, and ask again where there is none.

        Raises:
            ConfigError: what an actor raised.
        """
        ready, _ = self._ray.wait(list(self.asked), timeout=0) if self.asked else ([], [])
        for reference in ready:
            replica = self.asked.pop(reference)
            if self._take(reference, replica):
                for slow in self.asked.values():
                    slow.checking = slow.checking or self._check(slow)
                return True
        waited = time.monotonic() - self._last
        if waited > (HEDGE if self.asked else PAUSE) and (not self._working or not self.asked):
            self.ask()
        return False

    def _take(self, reference: Any, replica: Replica) -> bool:
        exceptions = self._ray.exceptions
        try:
            self.answer = self._ray.get(reference)
        except exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, ConfigError):
                raise ConfigError(str(cause)) from error
            reason = str(error if cause is None else cause).strip().splitlines()
            self.reason = reason[0] if reason else type(cause or error).__name__
            self.failures += self._at_work
            self._at_work = False
            self._signs.pop(replica, None)
            log.info("a replica of a shard is lost, asking again: %s", self.reason)
            if isinstance(error, exceptions.ActorDiedError):
                replica.again()
            replica.checking = self._check(replica)
            return False
        return True

    def _check(self, replica: Replica) -> Any:
        return replica.actor.__ray_ready__.remote()

    def _is_there(self, replica: Replica) -> bool:
        if replica.checking is None:
            return True
        ready, _ = self._ray.wait([replica.checking], timeout=0)
        if not ready:
            return False
        try:
            self._ray.get(replica.checking)
        except self._ray.exceptions.RayError:
            replica.checking = self._check(replica)
            return False
        replica.checking = None
        return True
