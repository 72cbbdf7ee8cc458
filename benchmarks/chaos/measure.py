"""Each fault in turn, and what it cost: failed requests, seconds to recover, records, acceptance, leftovers.

Recovered is the whole walk: every replica reports, a request that began afterwards was answered, and a record
that was stored afterwards was learnt from and acknowledged.
"""

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from benchmarks.chaos.faults import CannotInjectError, Fault
from benchmarks.chaos.service import Say, Service, wait_until
from benchmarks.chaos.traffic import Traffic
from buffer.errors import StoreUnavailableError
from buffer.names import DEFAULT_ROUTE
from buffer.redis_streams import stream_keys
from buffer.store import StreamKey

_NOT_YET = (StoreUnavailableError, httpx.HTTPError, IndexError)
"""What a look at a service raises that has not recovered; IndexError: nobody has read the stream yet."""
WINDOW_S = 6.0
"""Before a fault and after its end: where acceptance is measured."""
RECOVERY_S = 120.0
SETTLE_S = 90.0
_RUNNING = re.compile(r'^everdraft_num_requests_running\{replica="([^"]+)"\} (\S+)', re.MULTILINE)
_COME_AND_GO = ("idle worker", "ended")
"""Ray keeps workers ahead of need."""
LEARNER_GROUP = "learner"
_REPORT_S = 3.0
"""A replica that reports does so more often."""


@dataclass(frozen=True)
class Outcome:
    """One fault's row. Times in seconds; None: never."""

    fault: str
    not_run: str = ""
    """Why it was not injected; the figures then say nothing."""
    num_requests: int = 0
    """From the injection to the recovery."""
    num_failed: int = 0
    """Of these, those that failed though they were not under way on the part that died."""
    num_failed_on_dead_part: int = 0
    num_retried: int = 0
    """Answered, after the client's own retries."""
    answers_after_s: float | None = None
    """From the end of the fault (of its injection, where it does not last) to the first answer to a request
    that began then."""
    recovered_after_s: float | None = None
    num_stored: int = 0
    """Records that Redis had when the fault began."""
    num_lost: int | None = 0
    """Of these, those that are gone or that the learner never took in; None: the fault wipes them."""
    num_dropped: int = 0
    """Records that never reached Redis, as replicas count them."""
    acceptance_before: float = 0.0
    acceptance_after: float = 0.0
    left: str = ""
    """Slots, processes or descriptors too many, once all is quiet."""


@dataclass(frozen=True)
class _Quiet:
    """What the service holds when nothing is asked of it."""

    census: dict[str, int]
    descriptors: int
    num_running: int
    """Generations that hold a slot."""


class Chaos:
    """Injects faults into a service under traffic. `recovery_s`: after so long it counts as not recovered;
    `settle_s`: how long it may take until all is quiet."""

    def __init__(
        self,
        service: Service,
        traffic: Traffic,
        say: Say,
        *,
        recovery_s: float = RECOVERY_S,
        settle_s: float = SETTLE_S,
    ) -> None:
        self._service, self._traffic, self._say = service, traffic, say
        self._recovery_s, self._settle_s = recovery_s, settle_s
        self._reports: dict[str, tuple[float, float]] = {}
        self._stream = stream_keys("everdraft", StreamKey(service.note.target_revision, DEFAULT_ROUTE))[0]

    def run(self, faults: dict[str, Fault]) -> Iterator[Outcome]:
        self._learns()
        for name, fault in faults.items():
            self._say(f"{name} …")
            yield self._one(name, fault)

    def _learns(self) -> None:
        """Until the whole walk was walked once."""
        if not self._recovered(time.monotonic(), 2 * self._recovery_s):
            raise RuntimeError("the service never learnt from a record; nothing was injected")

    def _one(self, name: str, fault: Fault) -> Outcome:
        service, traffic = self._service, self._traffic
        quiet = self._quiet()
        time.sleep(WINDOW_S)
        stored, dropped = self._stored(), self._num_dropped()
        began_s = time.monotonic()
        try:
            fault.inject(service)
        except CannotInjectError as error:
            return Outcome(name, not_run=str(error))
        killed_s = time.monotonic()
        try:
            time.sleep(fault.hold_s)
        finally:
            fault.lift(service)
        over_s = time.monotonic()
        recovered_s = self._recovered(over_s, self._recovery_s)
        time.sleep(WINDOW_S)
        ended_s = time.monotonic()
        during = traffic.between(began_s, ended_s)
        failed = [one for one in during if one.error]
        on_dead = [one for one in failed if fault.kills and one.began_s < killed_s]
        for one in failed:
            self._say(f"  failed after {one.ended_s - one.began_s:.1f} s: {one.error}")
        answered = [one.ended_s for one in traffic.asked if one.began_s >= over_s and not one.error]
        left = self._left(quiet)
        return Outcome(
            name,
            num_requests=len(during),
            num_failed=len(failed) - len(on_dead),
            num_failed_on_dead_part=len(on_dead),
            num_retried=sum(one.num_retries > 0 and not one.error for one in during),
            answers_after_s=min(answered) - over_s if answered else None,
            recovered_after_s=recovered_s,
            num_stored=len(stored),
            num_lost=None if fault.wipes_records else self._num_lost(stored),
            num_dropped=max(0, self._num_dropped() - dropped),
            acceptance_before=traffic.acceptance(began_s - WINDOW_S, began_s),
            acceptance_after=traffic.acceptance(ended_s - WINDOW_S, ended_s),
            left=left,
        )

    # what is looked at

    def _recovered(self, since_s: float, timeout_s: float) -> float | None:
        """Seconds until the whole walk was walked since then."""
        newest: EntryId | None = None

        def walked() -> bool:
            nonlocal newest
            with suppress(*_NOT_YET):
                newest = newest or self._newest()
                return (
                    any(one.began_s >= since_s and not one.error for one in self._traffic.asked)
                    and self._num_reporting() == self._service.num_replicas
                    and self._acknowledged_until() > newest
                )
            return False

        return time.monotonic() - since_s if wait_until(walked, timeout_s) else None

    def _num_reporting(self) -> int:
        """Replicas whose status changed just now; a dead one's stays as it is until it expires."""
        now_s = time.monotonic()
        for status in self._service.statuses():
            if self._reports.get(status.replica_id, (0.0, 0.0))[0] != status.at_s:
                self._reports[status.replica_id] = (status.at_s, now_s)
        return sum(now_s - changed_s < _REPORT_S for _, changed_s in self._reports.values())

    def _newest(self) -> "EntryId":
        """Of the entries stored by now; they are numbered by Redis' clock, which may be off."""
        newest = self._service.on_redis(lambda client: client.xrevrange(self._stream, count=1))
        return _entry_id(newest[0][0]) if newest else (0, 0)

    def _acknowledged_until(self) -> "EntryId":
        """The newest entry before which all are acknowledged."""
        group, pending = self._group()
        return _entry_id(pending["min"] if pending["pending"] else group["last-delivered-id"])

    def _group(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The learner's, and what it has not acknowledged."""

        def ask(client: Any) -> Any:
            return client.xinfo_groups(self._stream)[0], client.xpending(self._stream, LEARNER_GROUP)

        group, pending = self._service.on_redis(ask)
        return group, pending

    def _stored(self, above: bytes | None = None) -> set[bytes]:
        """Ids of the entries that the stream has; only those above an id."""
        begin = "-" if above is None else b"(" + above
        entries = self._service.on_redis(lambda client: client.xrange(self._stream, begin, "+"))
        return {entry_id for entry_id, _ in entries}

    def _num_lost(self, stored: set[bytes]) -> int:
        """Of these, how many are gone or were not taken in. Called when all is quiet."""
        group, pending = self._group()
        unread = self._stored(above=group["last-delivered-id"])
        waiting = self._service.on_redis(
            lambda client: client.xpending_range(
                self._stream, LEARNER_GROUP, "-", "+", max(1, pending["pending"])
            )
        )
        not_taken_in = unread | {entry["message_id"] for entry in waiting}
        return len(stored - self._stored()) + len(stored & not_taken_in)

    def _num_dropped(self) -> int:
        with suppress(StoreUnavailableError):
            return sum(status.num_dropped_records for status in self._service.statuses())
        return 0

    def _quiet(self) -> _Quiet:
        """With no request under way and every record taken in, as far as that comes in time."""
        self._traffic.rest()
        wait_until(self._is_settled, self._settle_s)
        processes = self._service.processes()
        descriptors = 0
        for process in processes:
            with suppress(Exception):
                descriptors += process.num_fds()
        quiet = _Quiet(dict(self._service.census()), descriptors, self._num_running())
        self._traffic.go_on()
        return quiet

    def _is_settled(self) -> bool:
        with suppress(*_NOT_YET):
            group, _ = self._group()
            unread = self._stored(above=group["last-delivered-id"])
            return not unread and not group["pending"] and not self._num_running()
        return False

    def _left(self, before: _Quiet) -> str:
        """What there is more of than before, in words."""
        after = self._quiet()
        found = []
        if after.num_running:
            found.append(f"{after.num_running} slots")
        found += [
            f"{number - before.census.get(role, 0):+d} {role}"
            for role, number in sorted(after.census.items())
            if number > before.census.get(role, 0) and role not in _COME_AND_GO
        ]
        if after.descriptors > before.descriptors + 40 * self._service.num_replicas:
            found.append(f"{after.descriptors - before.descriptors:+d} descriptors")
        return ", ".join(found)

    def _num_running(self) -> int:
        """Generations in slots, of as many scrapes as there are replicas; the proxy chooses whose."""
        running: dict[str, int] = {}
        for _ in range(4 * self._service.num_replicas):
            text = httpx.get(f"{self._service.url}/metrics", timeout=5.0, trust_env=False).text
            for replica, number in re.findall(
                r'everdraft_num_requests_running\{replica="([^"]+)"\} (\S+)', text
            ):
                running[replica] = int(float(number))
        return sum(running.values())


EntryId = tuple[int, int]


def _entry_id(text: bytes) -> EntryId:
    milliseconds, _, number = text.partition(b"-")
    return int(milliseconds), int(number)


def as_metrics(outcomes: list[Outcome]) -> dict[str, Any]:
    return {"faults": [asdict(outcome) for outcome in outcomes]}
