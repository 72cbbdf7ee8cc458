"""Records of capture mode `memory` lie apart from the others, and no call mixes them up."""

import uuid
from dataclasses import replace

from buffer.memory_store import MemoryRecordStore
from buffer.redis_store import RedisRecordStore
from buffer.store import RecordFilter, StreamKey
from buffer.two_stores import TwoStores
from tests.buffer.samples import FakeClock, make_record

DURABLE = StreamKey("revision", "default")
IN_MEMORY = replace(DURABLE, in_memory=True)


def test_each_call_reaches_the_store_that_the_key_names(redis_url: str, clock: FakeClock) -> None:
    """Entry ids of one server mean nothing on the other: an acknowledgement at the wrong one would do
    nothing, or let go of another record."""
    durable = MemoryRecordStore(clock=clock)
    in_memory = RedisRecordStore(redis_url, clock=clock, prefix=uuid.uuid4().hex)
    store = TwoStores(durable, in_memory)
    for key, name in ((DURABLE, "kept"), (IN_MEMORY, "passing")):
        store.append(key, [make_record(name)])
        assert [record.record_id for record in store.draw_replay(key, 9, seed=0)] == [name]
    assert store.keys() == [DURABLE, IN_MEMORY]
    assert durable.keys() == in_memory.keys() == [DURABLE]
    delivered = {key: store.read_new(key, "learner", 9) for key in store.keys()}  # noqa: SIM118
    assert [one.record.record_id for [one] in delivered.values()] == ["kept", "passing"]
    store.ack(IN_MEMORY, [one.entry_id for one in delivered[IN_MEMORY]])
    assert (store.size(DURABLE).num_pending, store.size(IN_MEMORY).num_pending) == (1, 0)
    assert [one.record.record_id for one in store.claim(DURABLE, "learner", 0.0)] == ["kept"]
    assert store.claim(IN_MEMORY, "learner", 0.0) == []
    assert store.purge(IN_MEMORY, RecordFilter()).num_records == 1
    assert (store.size(DURABLE).num_records, store.size(IN_MEMORY).num_records) == (1, 0)
    assert DURABLE.name != IN_MEMORY.name
    store.close()
