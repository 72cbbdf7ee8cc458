"""Capture by key: what a tenant allows to be kept, on real servers; a service can only be stricter."""

import time
from collections.abc import Callable

import httpx
import pytest

from buffer.redis_server import EmbeddedRedis
from buffer.redis_store import RedisRecordStore
from serving.capture_mode import CaptureMode
from serving.settings import ServingSettings
from serving.tenants import digest_of
from tests.support.live_server import live_server

MODES: tuple[CaptureMode, ...] = ("off", "memory", "replay")
WAIT_S = 60.0


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline_s, "it did not come about in time"
        time.sleep(0.05)


def settings_of(pair: tuple[str, str], service: CaptureMode) -> ServingSettings:
    tenants = [{"name": mode, "keys": [digest_of(f"key-of-{mode}")], "capture": mode} for mode in MODES]
    return ServingSettings.model_validate(
        {
            "compile": "off",
            "target": pair[0],
            "draft": pair[1],
            "model_name": "tiny",
            "num_slots": 2,
            "max_seq_len": 256,
            "api_keys": ["key-of-nobody"],
            "capture": service,
            "tenants": tenants,
        }
    )


def stored(url: str) -> set[str]:
    """Ids of the requests of which records lie there."""
    store = RedisRecordStore(url)
    try:
        streams = store.keys()
        records = [record for key in streams for record in store.draw_replay(key, 1_000, 0)]
    finally:
        store.close()
    return {record.request_id.rpartition("-")[0] for record in records}


@pytest.mark.parametrize(
    ("service", "on_disk", "in_memory"),
    [("replay", ("replay", "nobody"), ("memory",)), ("memory", (), ("memory", "replay", "nobody"))],
)
def test_the_stricter_of_service_and_key_decides(
    tiny_pair: tuple[str, str],
    service: CaptureMode,
    on_disk: tuple[str, ...],
    in_memory: tuple[str, ...],
) -> None:
    with (
        EmbeddedRedis() as durable,
        EmbeddedRedis(is_sealed=True) as volatile,
        live_server(settings_of(tiny_pair, service), "r0", durable.url, volatile.url) as live,
    ):
        answers: dict[str, str] = {}
        for holder in ("off", "nobody", "memory", "replay"):
            for store in (None, False):
                body = {"prompt": "the quick brown fox", "max_tokens": 4, "ignore_eos": True, "store": store}
                headers = {"Authorization": f"Bearer key-of-{holder}"}
                answer = httpx.post(f"{live.url}/v1/completions", json=body, headers=headers, timeout=60)
                assert answer.status_code == 200, answer.text
                if store is None:
                    answers[holder] = answer.json()["id"]
        expected = {answers[holder] for holder in on_disk}, {answers[holder] for holder in in_memory}
        wait_until(lambda: (stored(durable.url), stored(volatile.url)) == expected)
    assert live.parts.status().num_dropped_records == 0


def test_a_tenants_mode_starts_what_it_needs(tiny_pair: tuple[str, str]) -> None:
    assert settings_of(tiny_pair, "replay").capture_modes == {"memory", "replay"}
    assert settings_of(tiny_pair, "memory").capture_modes == {"memory"}
    assert settings_of(tiny_pair, "off").capture_modes == frozenset()
