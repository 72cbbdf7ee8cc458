"""What is done to a running service, by name: how the fault begins, how it ends, and what it may cost.

Knows no measure. Invariant: `lift` undoes `inject`, whatever happened in between.
"""

import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chaos.service import Service, wait_until
from benchmarks.osd.bad_adapters import BAD_ADAPTERS
from buffer.names import DEFAULT_ROUTE
from deploy.child_command import everdraft_command

SLOW_S = 1.5
CLOCK_JUMP_S = 7200
_OTHER_PASSWORD = "not-the-one-that-it-was"
_LEARNER_START_S = 120.0
_PROMOTION_S = 120.0


class CannotInjectError(Exception):
    """Not possible on this machine or at this time; says why."""


@dataclass(frozen=True)
class Fault:
    """`hold_s`: how long it lasts before it is lifted; 0: it is over as soon as it was done."""

    inject: Callable[[Service], None]
    lift: Callable[[Service], None] = lambda service: None
    hold_s: float = 0.0
    kills: str = ""
    """The part that dies, with whatever was under way on it."""
    wipes_records: bool = False
    """What Redis held is gone, on purpose."""


def _slow(service: Service) -> None:
    service.link.delay_s = SLOW_S


def _fast(service: Service) -> None:
    service.link.delay_s = 0.0


def _set(name: str, value: str) -> Callable[[Service], None]:
    return lambda service: service.on_redis(lambda client: client.config_set(name, value))


def _wiped(service: Service) -> None:
    service.on_redis(lambda client: client.flushall())
    service.kill_redis()


def _wrong_password(service: Service) -> None:
    def change(client: Any) -> None:
        client.config_set("requirepass", _OTHER_PASSWORD)
        client.client_kill_filter(_type="normal", skipme=True)  # those that are open would stay so

    service.on_redis(change)


def _right_password(service: Service) -> None:
    """The server reads it from its configuration when it is started again."""
    service.kill_redis()


def _full(folder: Callable[[Service], Path]) -> Callable[[Service], None]:
    def fill(service: Service) -> None:
        if folder(service) not in service.mounted:
            raise CannotInjectError("a small disk cannot be mounted by this user")
        with suppress(OSError), (folder(service) / "filler").open("wb", buffering=0) as filler:
            while filler.write(b"\0" * 2**16):
                pass

    return fill


def _emptied(folder: Callable[[Service], Path]) -> Callable[[Service], None]:
    return lambda service: (folder(service) / "filler").unlink(missing_ok=True)


def _corrupt_checkpoint(service: Service) -> None:
    """The newest file of the default route, with one byte flipped, is all that the next learner finds new."""
    files = sorted(
        service.checkpoints.glob("target-*/**/*.safetensors"), key=lambda file: file.stat().st_mtime
    )
    if len(files) < 2:
        raise CannotInjectError(f"{len(files)} checkpoints were written by now, and one before is needed")
    learner = service.of_role("learner")[0]
    learner.suspend()  # no newer one
    files = sorted(
        service.checkpoints.glob("target-*/**/*.safetensors"), key=lambda file: file.stat().st_mtime
    )
    content = bytearray(files[-1].read_bytes())
    content[len(content) // 2] ^= 1
    files[-1].write_bytes(content)
    learner.kill()


def _clock(seconds: int) -> Callable[[Service], None]:
    def jump(service: Service) -> None:
        if service.clock_file is None:
            raise CannotInjectError("libfaketime is not installed (Debian's package faketime)")
        service.clock_file.write_text(f"{seconds:+d}\n")

    return jump


def _publish(tampering: str) -> Callable[[Service], None]:
    """A bad adapter in the feed, with the next version, as if a learner had sent it."""

    def publish(service: Service) -> None:
        feed = service.feed
        if not wait_until(lambda: feed.latest(DEFAULT_ROUTE) is not None, _PROMOTION_S):
            raise CannotInjectError("no draft was promoted by now")
        manifest = feed.latest(DEFAULT_ROUTE)
        assert manifest is not None
        weights = feed.weights(DEFAULT_ROUTE, manifest.draft_version)
        bad, bad_weights = BAD_ADAPTERS[tampering](manifest, weights, np.random.default_rng(0))
        following = feed.last_version(DEFAULT_ROUTE) + 1
        feed.publish(
            replace(bad, draft_version=following, parent_version=manifest.draft_version), bad_weights
        )

    return publish


def _second_learner(service: Service) -> None:
    """On the same Redis, with a state folder of its own, until `_no_second_learner`."""
    note, log = service.note, service.folder / "second-learner.log"
    with log.open("wb") as output:
        service.second_learner = process = subprocess.Popen(
            everdraft_command(
                *("learn", "--target", note.target, "--draft", note.draft),
                *("--redis-url", service.redis.url, "--state-dir", str(service.folder / "second")),
            ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    wait_until(lambda: b"Ctrl-C stops" in log.read_bytes() or process.poll() is not None, _LEARNER_START_S)
    if process.poll() is not None:
        raise CannotInjectError(f"it was refused: {log.read_text(errors='replace').strip()[-200:]}")


def _no_second_learner(service: Service) -> None:
    if service.second_learner is not None:
        service.second_learner.terminate()
        service.second_learner.wait(60.0)
        service.second_learner = None


def _second_service(service: Service) -> None:
    """Another target on this state folder is refused while this one has it."""
    done = subprocess.run(
        everdraft_command(
            "serve", "--target", service.note.draft, "--state-dir", str(service.state_dir), "--port", "1"
        ),
        capture_output=True,
        text=True,
        check=False,
        timeout=120.0,
    )
    if done.returncode != 2 or "is in use" not in done.stderr:
        raise RuntimeError(f"a second service was not refused: {done.stderr.strip()[-300:]}")


def _kill(role: str) -> Callable[[Service], None]:
    return lambda service: service.kill_one(role)


_checkpoints, _mlflow = attrgetter("checkpoints"), attrgetter("mlflow_folder")


def faults(hold_s: float) -> dict[str, Fault]:
    """By name, in the order in which they are injected. `hold_s`: of those that last."""
    return {
        "Redis: SIGKILL": Fault(Service.kill_redis),
        "Redis: slow": Fault(_slow, _fast, hold_s),
        "Redis: full": Fault(_set("maxmemory", "1mb"), _set("maxmemory", "0"), hold_s),
        "Redis: read-only": Fault(
            lambda service: service.on_redis(lambda client: client.replicaof("127.0.0.1", "1")),
            lambda service: service.on_redis(lambda client: client.replicaof("NO", "ONE")),
            hold_s,
        ),
        "Redis: wrong password": Fault(_wrong_password, _right_password, hold_s),
        "Redis: restarted empty": Fault(_wiped, wipes_records=True),
        "learner: SIGKILL": Fault(_kill("learner"), kills="learner"),
        "learner: checkpoint corrupt": Fault(_corrupt_checkpoint, kills="learner"),
        "learner: disk full": Fault(_full(_checkpoints), _emptied(_checkpoints), hold_s),
        "learner: a second one": Fault(_second_learner, _no_second_learner, hold_s),
        "replica: SIGKILL": Fault(_kill("replica"), kills="replica"),
        "proxy: SIGKILL": Fault(_kill("proxy"), kills="proxy"),
        "MLflow: SIGKILL": Fault(
            lambda service: service.mlflow.kill(), lambda service: service.mlflow.start(), hold_s
        ),
        "MLflow: disk full": Fault(_full(_mlflow), _emptied(_mlflow), hold_s),
        "Redis: clock two hours ahead": Fault(_clock(CLOCK_JUMP_S), _clock(0), hold_s),
        "Redis: clock two hours back": Fault(_clock(-CLOCK_JUMP_S), _clock(0), hold_s),
        "adapter: truncated": Fault(_publish("truncated"), hold_s=hold_s / 2),
        "adapter: of another target": Fault(_publish("foreign target"), hold_s=hold_s / 2),
        "adapter: NaN": Fault(_publish("NaN"), hold_s=hold_s / 2),
        "state folder: another target": Fault(_second_service),
    }
