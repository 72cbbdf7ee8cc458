"""Ray and the HTTP endpoint: started on loopback or joined by address, and always taken down again.

Knows nothing of models, records or learning. Invariant: whatever `own_ray` starts ends with this process,
even by SIGKILL (Ray asks the kernel for that, and `ray_guard` sees to the rest), and nothing is
written to the user's home.
"""

import io
import logging
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from buffer.redaction import redacted
from deploy import ray_guard
from deploy.doorkeeper import kept_door
from deploy.errors import ClusterError
from deploy.settings import ClusterSettings
from serving.api.request_ids import SERVE_PROXY_ENVIRONMENT

APPLICATION = "everdraft"
_REASON_CHARACTERS = 300
_ANSWER_S = 30.0
"""A replica that runs answers at once; it may be kept from it by a busy machine."""


def ray_session(
    settings: ClusterSettings, *, num_cpus: int, locks: tuple[int, ...] = (), folder: Path | None = None
) -> AbstractContextManager[None]:
    """Connected to Ray inside the block: the one at the given address, or one of our own.

    `locks` are descriptors that stay open until the last process of a Ray of our own is gone. `folder`: in
    which such a Ray keeps its files, what it spills included; None: that for temporary ones.
    """
    if settings.ray_address is not None:
        return _joined_ray(settings.ray_address, settings.namespace)
    return own_ray(
        namespace=settings.namespace,
        num_cpus=num_cpus,
        object_store_bytes=settings.object_store_bytes,
        locks=locks,
        folder=folder,
    )


@contextmanager
def own_ray(
    *,
    namespace: str,
    num_cpus: int,
    object_store_bytes: int,
    locks: tuple[int, ...] = (),
    folder: Path | None = None,
) -> Iterator[None]:
    """A Ray of our own. `num_cpus` is what may be scheduled, not what there is; the others as above.

    Ray listens on every interface, so it gets a token of its own that only its processes know.
    """
    _require_token()
    _share_accelerators()
    _prefer_serving()
    _guard_headers()
    _await_proxy()
    with _guarded_folder(locks, folder or temp_root()) as own_folder:
        try:
            with _refused("Ray did not start, and nothing was started on it; this machine may be too busy"):
                ray.init(
                    address="local",
                    namespace=namespace,
                    num_cpus=num_cpus,
                    object_store_memory=object_store_bytes,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=str(own_folder),
                )
            yield
        finally:
            with redirect_stdout(io.StringIO()):
                # Ray tells standard output that Serve's controller, which we ended, has ended.
                ray.shutdown()


@contextmanager
def _guarded_folder(locks: tuple[int, ...], root: Path) -> Iterator[Path]:
    """A folder for one Ray. When the block or this process ends, the guard ends that Ray and removes it,
    and lets go of the locks last."""
    folder = Path(tempfile.mkdtemp(prefix="everdraft-", dir=root))
    guard = subprocess.Popen(
        [sys.executable, "-P", ray_guard.__file__, str(os.getpid()), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is not for the guard
        pass_fds=locks,
    )
    with guard:
        assert guard.stdout is not None
        guard.stdout.readline()
        yield folder


@contextmanager
def _joined_ray(address: str, namespace: str) -> Iterator[None]:
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        text = f"cluster.ray_address={address}: no Ray answers there ({error})"
        raise ClusterError(redacted(text)) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def endpoint(
    application: serve.Application, *, host: str, port: int, keeps_door: bool = False
) -> Iterator[str]:
    """The application answers on host:port inside the block, which is given the revision of its target;
    leaving it stops it; see `draining` for what comes before. `keeps_door`: on this machine alone, so that
    clients wait here while its proxy is started again.

    Raises ClusterError when the application cannot start.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with _refused(f"Ray Serve did not start on port {port}; this machine may be too busy"):
        serve.start(http_options={"host": host, "port": port})
    try:
        revision = _run(application)
        with kept_door(host, port) if keeps_door else nullcontext():
            yield revision
    finally:
        with suppress(Exception), redirect_stdout(io.StringIO()):
            # Ray may be gone already, for example after SIGKILL of one of its processes.
            serve.shutdown()


@contextmanager
def _refused(failure: str) -> Iterator[None]:
    """Whatever Ray raises inside is a ClusterError of one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:_REASON_CHARACTERS] or type(error).__name__
        raise ClusterError(redacted(f"{failure}: {reason}")) from error


def _run(application: serve.Application) -> str:
    try:
        handle: Any = serve.run(
            application, name=APPLICATION, route_prefix="/", logging_config={"log_level": "ERROR"}
        )
        return str(handle.target_revision.remote().result(timeout_s=_ANSWER_S))
    except (RuntimeError, TimeoutError) as error:
        raise ClusterError(f"the replica did not start: {_failure(str(error))}") from error


def _failure(fallback: str) -> str:
    """The last line of the replica's own traceback, which names what is wrong."""
    application = serve.status().applications.get(APPLICATION)
    if application is None or application.status == ApplicationStatus.RUNNING:
        return fallback
    messages = [part.message for part in application.deployments.values() if part.message]
    lines = [line.strip() for line in "\n".join(messages or [fallback]).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1])


def temp_root() -> Path:
    """A temporary folder whose path leaves room for Ray's sockets (107 bytes at most in all)."""
    usual = Path(tempfile.gettempdir())
    return usual if len(str(usual)) <= 24 else Path("/tmp")


def _require_token() -> None:
    """One a process, since Ray reads it once; read by children, never written to the user's home."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _prefer_serving() -> None:
    """Ray starts its workers at niceness 15, where the learner's own niceness counts for nothing: replicas
    run at 0, so that the learner gives way to them."""
    os.environ.setdefault("RAY_worker_niceness", "0")


def _guard_headers() -> None:
    """A Ray that is joined must have this in its nodes' environment; without it Serve's proxy there answers
    500 to a request id that is no UTF-8."""
    for name, value in SERVE_PROXY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _await_proxy() -> None:
    """Serve kills a proxy that is not ready within five seconds, over and over on a machine that is busy; and
    looks only every ten seconds whether one has died."""
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "1")


def _share_accelerators() -> None:
    """Replicas and learner ask Ray for no GPU of their own; without this Ray would hide all from them."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
