"""A replica on a real Redis that is absent, comes, dies and comes back: answers flow all the while."""

import time
from collections.abc import Callable

import pytest

from buffer.redis_feed import RedisAdapterFeed
from buffer.redis_server import EmbeddedRedis
from buffer.redis_store import RedisRecordStore
from serving.engine import GenerationRequest, SamplingParams
from serving.models.loading import UnsupportedModelError
from serving.replica_parts import ReplicaParts, open_parts
from serving.settings import ServingSettings
from tests.support.tiny_adapters import tiny_adapter
from tests.support.tiny_models import tiny_model


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.02)


def answer(parts: ReplicaParts) -> list[int]:
    """As the API runs a request: captured, and recorded when it ends."""
    recorder = parts.context.recorder
    assert recorder is not None
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    request = GenerationRequest(f"cmpl-{time.monotonic_ns()}-0", (5, 6), sampling, capture=True)
    generation = parts.engine.submit(request).result(timeout_s=30)
    recorder.record(generation, "replay")
    return generation.output_token_ids


def test_a_replica_outlives_its_redis_in_every_order(tiny_pair: tuple[str, str]) -> None:
    target, draft = tiny_pair
    settings = ServingSettings(
        compile="off",
        target=target,
        draft=draft,
        num_slots=2,
        max_seq_len=64,
        boot_timeout_s=0.2,
        status_interval_s=0.05,
    )
    redis = EmbeddedRedis().start()
    redis.stop()
    parts = open_parts(settings, redis.url, "r0")
    try:
        assert parts.engine.draft_version == 0
        expected = answer(parts)
        wait_for(lambda: parts.status().num_dropped_records > 0 or not answer(parts))
        assert parts.status().last_error

        redis.start()
        revision = parts.engine.pair.target_revision
        feed, store = RedisAdapterFeed(redis.url, revision), RedisRecordStore(redis.url)
        publish = tiny_adapter(draft, draft_version=1, target_revision=revision)
        feed.publish(*publish)
        wait_for(lambda: parts.engine.draft_version == 1)
        wait_for(lambda: answer(parts) == expected and bool(store.keys()))
        wait_for(lambda: [status.replica_id for status in feed.statuses()] == ["r0"])

        redis.stop()
        assert answer(parts) == expected
        redis.start()
        wait_for(lambda: bool(feed.statuses()))
        assert (parts.engine.draft_version, answer(parts)) == (1, expected)
        feed.close()
        store.close()
    finally:
        parts.close()
        redis.stop()


def test_without_redis_nothing_is_recorded_and_the_draft_as_loaded_serves(
    tiny_pair: tuple[str, str],
) -> None:
    parts = open_parts(
        ServingSettings(compile="off", target=tiny_pair[0], draft=tiny_pair[1], num_slots=1, max_seq_len=64),
        None,
        "r0",
    )
    assert parts.context.recorder is None
    assert parts.context.is_ready
    parts.close()
    parts.close()
    assert not parts.context.is_ready


def test_a_target_without_a_tokenizer_is_refused_at_start(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("bare")
    tiny_model("llama", 1, 320).save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match="no tokenizer"):
        open_parts(
            ServingSettings(compile="off", target=str(folder), num_slots=1, max_seq_len=64), None, "r0"
        )
