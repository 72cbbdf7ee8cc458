"""Ends a service without losing a request that it took: what is new is refused, what is under way goes on.

Invariant: no wait is longer than the time that was given for it.
"""

import http.client
import math
import threading
import time
import urllib.error
import urllib.request
from typing import Any

from ray import serve
from ray.exceptions import RayError

from deploy.cluster import APPLICATION
from serving.api.open_requests import OLDEST_HEADER

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Whatever proxy the environment names is not for the service's own address."""
_POLL_S = 0.1
_ANSWER_S = 5.0
"""A replica answers at once; a busy machine may keep it from it."""
_LAST_WORDS_S = 2.0
"""For the errors of those that are aborted to reach their clients."""


def drain(url: str, *, timeout_s: float, abort: threading.Event) -> bool:
    """Let every replica refuse new requests, and wait until all that are under way were answered whole.

    False: time was up, or `abort` was set, and the rest was ended with an error."""
    try:
        handle: Any = serve.get_app_handle(APPLICATION)
    except Exception:  # whatever Ray raises where Serve was killed: nothing is under way
        return True
    if _is_quiet(handle, url, timeout_s, abort):
        return True
    _ask(handle, "abort")
    _is_quiet(handle, url, _LAST_WORDS_S, threading.Event())
    return False


def _is_quiet(handle: Any, url: str, timeout_s: float, abort: threading.Event) -> bool:
    """Whether it became so in time: every replica is done, and its proxy with what was asked before."""
    deadline_s, refused_s = time.monotonic() + timeout_s, math.inf
    while True:
        open_by_replica = _ask(handle, "drain")
        if open_by_replica is not None:
            refused_s = min(refused_s, time.monotonic())
            if not any(open_by_replica) and _oldest_began_s(url) >= refused_s:
                return True
        if time.monotonic() >= deadline_s or abort.wait(_POLL_S):
            return False


def _ask(handle: Any, method: str) -> list[int] | None:
    """What each replica answers, those that were started meanwhile included; None: one did not. Empty where
    none is left, so that there is nobody to wait for."""
    try:
        return list(handle.broadcast(method).results(timeout_s=_ANSWER_S))
    except (TimeoutError, RayError):
        return None
    except Exception:  # Serve has ended, or never began
        return []


def _oldest_began_s(url: str) -> float:
    """When the oldest request began that the proxy still answers, by `time.monotonic`, or a little before;
    infinity: there is none, or this proxy does not say."""
    asked_s = time.monotonic()
    try:
        try:
            with _DIRECT.open(f"{url}/ready", timeout=_ANSWER_S) as answer:
                age = answer.headers.get(OLDEST_HEADER)
        except urllib.error.HTTPError as refused:
            with refused:
                age = refused.headers.get(OLDEST_HEADER)
        return math.inf if age in (None, "none") else asked_s - float(age)
    except (OSError, http.client.HTTPException, ValueError):
        return math.inf
