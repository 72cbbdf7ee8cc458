"""The real engine, thread and all, played by a script: the same schedule gives the same rounds every time.

Before each turn of its loop the engine's own thread checks what must hold between rounds, poisons every
column that belongs to nobody, and fires the events that are due. Nothing else is replaced.
"""

import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from buffer.names import MODEL_DRAFTER
from serving.drafters.model_drafter import ModelDrafter
from serving.drafters.ngram_drafter import NgramDrafter
from serving.drafters.stopping import stopping_rule
from serving.engine import Generation
from serving.engine.core import EngineCore
from serving.engine.draft_length import DraftLengthController, Lengths, Row
from serving.engine.draft_pool import Staged
from serving.engine.engine import Engine
from serving.engine.handle import GenerationHandle
from serving.engine.passes.prefix_cache import PrefixCache
from serving.engine.passes.runner import Runner
from serving.engine.passes.slot_cache import SlotCache
from serving.engine.proposal import Drafter, LookupDrafter, Proposal
from serving.engine.sampling import draw, draw_uniforms
from serving.engine.sequence import Batch
from tests.support.schedules import Cancel, Close, Event, Join, Open, Schedule, Swap
from tests.support.table_engine import ScriptedDrafter, StagedTable
from tests.support.table_model import NUM_ROWS, TableModel

POISON = 1e30
_BLOCK_TOKENS = 2
_STOPS_AT = {"top_prob": 0.6, "entropy": 1.0}
_PATIENCE_S = 120.0


class ScriptedLength(DraftLengthController):
    """The script's draft lengths, one a round; where there is something to copy, every other row does."""

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__(None, fixed=max(lengths))
        self._script, self._round = lengths, 0

    def choose(self, rows: Sequence[Row], *, can_draft: bool = True) -> Lengths:
        self._round += 1
        length = self._script[(self._round - 1) % len(self._script)]
        wanted = [min(length, row.max_draft_tokens) for row in rows]
        copied = [
            count if row.num_matched and (self._round + index) % 2 else 0
            for index, (row, count) in enumerate(zip(rows, wanted, strict=True))
        ]
        drafted = [count if can_draft and not copy else 0 for count, copy in zip(wanted, copied, strict=True)]
        return Lengths(drafted, copied)


class ArbitraryDrafter:
    """Draws from distributions that have nothing to do with any model, as many tokens as it likes, and says
    so."""

    drafter_id = MODEL_DRAFTER

    def __init__(self, vocab_size: int, seed: int) -> None:
        self.draft_version = 0
        self._vocab_size = vocab_size
        self._generator = torch.Generator().manual_seed(seed)

    def propose(
        self,
        batch: Batch,
        num_draft_tokens_B: list[int],
        noise_BEV: Tensor | None,
        generator: torch.Generator | None,
    ) -> Proposal:
        drafted = [self._integer(count + 1) for count in num_draft_tokens_B]
        shape = (len(batch), max(drafted), self._vocab_size)
        sharpness = (0.0, 1.0, 30.0)[self._integer(3)]
        logprobs_BGV_ = (sharpness * torch.randn(shape, generator=self._generator)).log_softmax(-1)
        flat_NV = logprobs_BGV_.flatten(0, 1)
        token_BG = draw(flat_NV.exp(), draw_uniforms(flat_NV, self._generator)).view(shape[:2])
        return Proposal(
            draft_version=self.draft_version,
            token_ids_BG=token_BG,
            num_drafted_B=tuple(drafted),
            logprobs_BGV=logprobs_BGV_,
            token_logprobs_BG=logprobs_BGV_.gather(-1, token_BG[..., None])[..., 0],
        )

    def _integer(self, end: int) -> int:
        return int(torch.randint(end, (), generator=self._generator))

    def refresh(self, draft_version: int) -> None:
        self.draft_version = draft_version

    def observe(self, num_drafted_B: list[int], num_accepted_B: list[int]) -> None: ...

    def clear(self, slot: int) -> None: ...

    def move(self, source: int, destination: int) -> None: ...

    def reset(self) -> None: ...


class ScheduledEngine(Engine):
    """Plays the events of a schedule, ends when they and all its work are done."""

    def __init__(
        self,
        schedule: Schedule,
        target: TableModel,
        draft: TableModel,
        *,
        drafter_class: type[ModelDrafter] = ModelDrafter,
        checks_caches: bool = True,
    ) -> None:
        self._schedule = schedule
        self._draft_tables = {"default": draft}
        self._drafter_class, self._shipped = drafter_class, deepcopy(draft)
        self._checks_caches = checks_caches
        self._turn = -1
        self._left = list(schedule.events)
        self._handles: dict[str, GenerationHandle] = {}
        self._failure: BaseException | None = None
        self._is_seeded = False
        runner = Runner(target, num_slots=schedule.num_slots, max_seq_len=schedule.max_seq_len)
        super().__init__(
            EngineCore(
                runner,
                _drafter(schedule, draft, drafter_class),
                controller=ScriptedLength(schedule.draft_lengths),
                floor=self._floor_of(draft),
                ngram=_copier(schedule),
                prefill_chunk_tokens=schedule.chunk_tokens,
                prefix_cache=_prefix_cache(schedule, runner),
            ),
            eos_token_ids=schedule.eos_token_ids,
        )

    def play(self) -> dict[str, Generation]:
        """Generations by request id, once the script is through. Raises what failed on the way."""
        self._thread.join(_PATIENCE_S)
        assert not self._thread.is_alive(), f"the engine still runs after {_PATIENCE_S} s"
        if self._failure is not None:
            raise self._failure
        return {request_id: handle.result(1.0) for request_id, handle in self._handles.items()}

    # -- the engine thread ----------------------------------------------------------------------

    def _take_commands(self, *, wait: bool) -> None:
        if not self._closed.is_set():
            try:
                self._before_turn(is_idle=wait)
            except BaseException as failure:
                self._failure = failure
                self._closed.set()
        super()._take_commands(wait=False)

    def _before_turn(self, *, is_idle: bool) -> None:
        if not self._is_seeded:
            self.core.generator.manual_seed(self._schedule.seed)
            self._is_seeded = True
        if is_idle and not self._left:
            self._closed.set()
            return
        self._turn = max(self._turn + 1, self._left[0].turn) if is_idle else self._turn + 1
        self._check_lengths()
        if self._schedule.poisoned:
            self._poison()
        while self._left and self._left[0].turn <= self._turn:
            self._fire(self._left.pop(0))

    def _fire(self, event: Event) -> None:
        if isinstance(event, Join):
            self._handles[event.request.request_id] = self.submit(event.request)
        elif isinstance(event, Cancel):
            self._handles[event.request_id].cancel()
        elif isinstance(event, Open):
            self._open(event.route)
        elif isinstance(event, Close):
            self.close_draft(event.route)
        elif event.route in self._draft_tables:
            model = self._draft_tables[event.route]
            self.swap(StagedTable(event.draft_version, model, self._table(event)), event.route)

    def _open(self, route: str) -> None:
        model = self._draft_tables[route] = deepcopy(self._shipped)
        drafter = _drafter(self._schedule, model, self._drafter_class)
        if drafter is not None:
            self.open_draft(route, drafter, self._floor_of(model))

    def _floor_of(self, model: TableModel) -> Callable[[], Staged] | None:
        shipped = self._shipped.table
        has_floor = self._schedule.has_floor and self._schedule.drafter == "model"
        return (lambda: StagedTable(0, model, shipped)) if has_floor else None

    def _table(self, swap: Swap) -> Tensor:
        like = self._shipped.table
        if swap.table == "target":
            return self.core.target.model.table.clone()  # type: ignore[operator]
        if swap.table in {"zero", "huge", "nan", "inf"}:
            value = {"zero": 0.0, "huge": 1e30, "nan": torch.nan, "inf": torch.inf}[swap.table]
            return torch.full_like(like, value)
        of_swap = swap.draft_version + 100 * sorted(self._draft_tables).index(swap.route)
        generator = torch.Generator().manual_seed(1000 * self._schedule.seed + of_swap)
        table = torch.randn(like.shape, generator=generator)
        if swap.table == "holes":
            table[:, 1:][torch.rand(table[:, 1:].shape, generator=generator) < 0.5] = -torch.inf
        return 30.0 * table if swap.table == "sharp" else table

    def _owned(self, drafter: ModelDrafter | None) -> list[tuple[int, list[int], int]]:
        """(slot, token ids, columns that count) of every slot in use; without a drafter, of the target's."""
        scheduler = self.core.scheduler
        sequences = [*scheduler.running, *([scheduler.prefilling] if scheduler.prefilling else [])]
        cached = [sequence.num_cached for sequence in sequences]
        if drafter is not None:
            cached = drafter._cached[: len(sequences)]
        return [
            (slot, sequence.token_ids, count)
            for slot, (sequence, count) in enumerate(zip(sequences, cached, strict=True))
        ]

    def _caches(self) -> list[tuple[SlotCache, list[tuple[int, list[int], int]]]]:
        caches = [(self.core.target.cache, self._owned(None))]
        for drafter in self.core.drafts.drafters:
            if isinstance(drafter, ModelDrafter):
                caches.append((drafter.runner.cache, self._owned(drafter)))
        return caches

    def _check_lengths(self) -> None:
        """The invariants between two rounds; columns that count hold their own tokens' keys."""
        running = self.core.scheduler.running
        assert len(running) + (self.core.scheduler.prefilling is not None) <= self.core.scheduler.num_slots
        assert all(sequence.finish_reason is None for sequence in running), "a finished one kept its slot"
        for sequence in running:
            assert sequence.num_cached == len(sequence.token_ids) - 1, "the target's cache lags or leads"
        if not self._checks_caches:
            return
        for cache, owned in self._caches():
            for slot, token_ids, count in owned:
                assert 0 <= count <= len(token_ids) - 1, "a cache leads"
                keys = cache.kv_L2SHTD[0, 0, slot, 0, :count, 0].tolist()
                assert keys == _keys(token_ids[:count]), f"slot {slot} holds another text's keys"

    def _poison(self) -> None:
        with torch.inference_mode():
            for cache, owned in self._caches():
                for slot in range(cache.kv_L2SHTD.shape[2]):
                    count = owned[slot][2] if slot < len(owned) else 0
                    cache.kv_L2SHTD[:, :, slot, :, count:] = POISON


def _drafter(schedule: Schedule, draft: TableModel, drafter_class: type[ModelDrafter]) -> Drafter | None:
    if schedule.drafter == "arbitrary":
        return ArbitraryDrafter(schedule.vocab_size, schedule.seed)
    if schedule.drafter == "none":
        return None
    runner = Runner(draft, num_slots=schedule.num_slots, max_seq_len=schedule.max_seq_len)
    stopping = stopping_rule(schedule.stopping, _STOPS_AT.get(schedule.stopping))
    return drafter_class(runner, chunk_tokens=schedule.draft_chunk_tokens, stopping=stopping)


def _prefix_cache(schedule: Schedule, target: Runner) -> PrefixCache | None:
    if schedule.num_prefix_blocks == 0:
        return None
    max_bytes = schedule.num_prefix_blocks * _BLOCK_TOKENS * target.cache.column_bytes
    return PrefixCache(target.cache, max_bytes=max_bytes, block_tokens=_BLOCK_TOKENS)


def _copier(schedule: Schedule) -> LookupDrafter | None:
    if schedule.copies == "none":
        return None
    if schedule.copies == "ngram":
        return NgramDrafter(schedule.num_slots)
    chooser = random.Random(schedule.seed)
    return ScriptedDrafter(
        lambda context, count: [chooser.randrange(schedule.vocab_size) for _ in range(count)]
    )


def _keys(token_ids: list[int]) -> list[float]:
    """What a TableModel caches of a text."""
    return [float((token + 1) * (position + 1) % NUM_ROWS) for position, token in enumerate(token_ids)]


def play(schedule: Schedule, target: TableModel, draft: TableModel, **options: Any) -> dict[str, Generation]:
    """Run a schedule to its end."""
    return ScheduledEngine(schedule, target, draft, **options).play()
