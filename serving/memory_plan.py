"""Plans the memory that serving will hold at most, by part, from the settings and the models' shapes.

Allocates nothing and reads no device (`serving.free_memory` does). Worst cases: every slot runs a generation
of `max_seq_len` tokens that is captured and whose drafts are all rejected. Not in it: one pass's activations,
the libraries themselves, staged adapters, compiled code, and what the learner takes. Invariant: weights,
keys and values and the prefix cache are exactly the bytes that are allocated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import nn

from serving.engine.capture import TOP_K
from serving.engine.draft_length import MAX_DRAFT_TOKENS
from serving.engine.passes.kv_shape import KvShape
from serving.engine.passes.packed_linear import packable
from serving.engine.passes.prefix_cache import BLOCK_TOKENS
from serving.engine.request import captured_round_bytes
from serving.free_memory import FreeMemory
from serving.models.context_limit import fitted_context
from serving.models.loading import ModelPair, load_outlines
from serving.models.target_part import TargetPart, own_tensors
from serving.options import EngineOptions

_ROUND_POSITIONS = MAX_DRAFT_TOKENS + 1
_LOGITS_COPIES = 4
"""Float32 copies of the logits: raw logits, the distribution, noise, and one intermediate."""
_SLOTS_FOR_PREFIXES = 4
"""By default the prefix cache gets the keys and values of one slot for so many slots, at least one."""


class MemoryPlanError(ValueError):
    """What the settings ask for does not fit; the message names numbers that do."""


@dataclass(frozen=True)
class ModelSize:
    """Memory of a model, whether or not its weights are loaded yet."""

    weights_bytes: int
    column_bytes: int
    """Bytes of keys and values of one token."""
    vocab_size: int
    packable_bytes: int = 0
    """Of the linear layers that a processor may hold packed, too."""

    @classmethod
    def of(cls, model: nn.Module) -> "ModelSize":
        """The size of a model, or of its outline on the meta device; of a part of the target, what it does
        not share with it."""
        part, shape = TargetPart.of(model), KvShape.of(model)
        weights = [*model.parameters(), *model.buffers()] if part is None else own_tensors(model).values()
        num_values = shape.num_values
        if part is not None:
            num_values -= num_values * part.exit_layer // shape.num_layers
        return cls(
            weights_bytes=sum(weight.numel() * weight.element_size() for weight in weights),
            column_bytes=num_values * next(model.parameters()).element_size(),
            vocab_size=shape.vocab_size,
            packable_bytes=sum(layer.weight.nbytes for layer in packable(model)),
        )


@dataclass(frozen=True)
class Part:
    """One part of the memory."""

    name: str
    num_bytes: int
    on_host: bool = False
    """Whether it is in the host's memory even if the models run on a GPU."""
    is_held: bool = False
    """Whether it is allocated already."""
    is_optional: bool = False
    """Whether it is taken only where it is free beside all others."""


@dataclass(frozen=True)
class MemoryPlan:
    """The plan of a model pair that runs with `options`."""

    options: EngineOptions
    target: ModelSize
    draft: ModelSize | None = None
    weights_loaded: bool = False
    """True between loading and allocating: the target and the draft as loaded are allocated already."""
    note: str = ""
    """Why `max_seq_len` is less than was asked for; empty if it is not."""

    @classmethod
    def of(cls, pair: ModelPair, options: EngineOptions) -> Self:
        """The plan of a loaded pair. Its options are corrected: `max_seq_len` is cut to what both models can
        hold, and without a draft no route has one. Raises UnsupportedModelError for a model that is wrong at
        that length."""
        max_seq_len, note = fitted_context(options.max_seq_len, pair.named)
        options = replace(options, max_seq_len=max_seq_len)
        if options.num_slots < 1 or options.max_seq_len < 2:
            raise ValueError(
                f"num_slots={options.num_slots} and max_seq_len={options.max_seq_len} leave no room for a "
                "token to continue; at least 1 and 2 are needed"
            )
        if pair.draft is None or not options.uses_model:
            options = replace(options, max_route_drafts=0)
        draft = None if pair.draft is None else ModelSize.of(pair.draft)
        return cls(options, ModelSize.of(pair.target), draft, weights_loaded=True, note=note)

    @classmethod
    def outlined(
        cls,
        target: str,
        draft: str | None,
        options: EngineOptions,
        *,
        dtype: str,
        untie_draft: bool = False,
    ) -> Self:
        """The plan of models that are not loaded yet (paths or hub ids). Raises UnsupportedModelError."""
        outline, other = load_outlines(target, draft, dtype=dtype, untie_draft=untie_draft)
        named = [(target, outline), *([] if other is None else [(str(draft), other)])]
        max_seq_len, note = fitted_context(options.max_seq_len, named)
        size = None if other is None else ModelSize.of(other)
        return cls(replace(options, max_seq_len=max_seq_len), ModelSize.of(outline), size, note=note)

    @property
    def prefix_cache_bytes(self) -> int:
        """Bytes of the prefix cache's whole blocks."""
        block_bytes = BLOCK_TOKENS * self.target.column_bytes
        if self.options.prefix_cache_mib is None:
            num_columns = (
                max(self.options.num_slots, _SLOTS_FOR_PREFIXES)
                * self.options.max_seq_len
                // _SLOTS_FOR_PREFIXES
            )
            return num_columns // BLOCK_TOKENS * block_bytes
        return int(self.options.prefix_cache_mib * 2**20) // block_bytes * block_bytes

    @property
    def draft_prefix_cache_bytes(self) -> int:
        """Bytes of a draft's own prefix cache, which has as many blocks as the target's."""
        if self.draft is None:
            return 0
        return self.prefix_cache_bytes // self.target.column_bytes * self.draft.column_bytes

    @property
    def route_draft_bytes(self) -> int:
        """Bytes of the draft of one more route."""
        if self.draft is None:
            return 0
        return self.draft.weights_bytes + self._kv_bytes(self.draft) + self.draft_prefix_cache_bytes

    @property
    def capture_bytes(self) -> int:
        """Bytes of captured rounds in the worst case: a round for every token, each with the longest
        draft."""
        if self.options.export_queue_bytes == 0:
            return 0
        num_kept = min(TOP_K, self.target.vocab_size)
        return (
            self.options.num_slots
            * self.options.max_seq_len
            * captured_round_bytes(_ROUND_POSITIONS, num_kept)
        )

    def parts(self) -> tuple[Part, ...]:
        """The parts that take memory."""
        logits = self.options.num_slots * _ROUND_POSITIONS * self.target.vocab_size * 4 * _LOGITS_COPIES
        held = self.weights_loaded
        parts = [Part("weights of the target", self.target.weights_bytes, is_held=held)]
        if self.draft is not None:
            parts += [
                Part("weights of the draft as shipped (floor)", self.draft.weights_bytes, is_held=held),
                Part("weights of the live draft", self.draft.weights_bytes),
                Part("keys and values of the draft", self._kv_bytes(self.draft)),
                Part("cached prefixes of the draft", self.draft_prefix_cache_bytes),
                Part(f"drafts of {self._num_route_drafts} more routes", self._route_drafts_bytes()),
            ]
        parts += [
            Part("keys and values of the target", self._kv_bytes(self.target)),
            Part("prefix cache", self.prefix_cache_bytes),
            Part("logits of a round", logits),
            Part(
                "large layers of the target, packed for short passes",
                self.target.packable_bytes,
                is_optional=True,
            ),
            Part("capture of running generations", self.capture_bytes, on_host=True),
            Part("records on their way to the buffer", self.options.export_queue_bytes, on_host=True),
        ]
        return tuple(part for part in parts if part.num_bytes)

    def lines(self, *others: Part) -> list[str]:
        """For display: a line for each part, those of the process among them, and one for the sum."""
        head = (
            f"memory planned for num_slots={self.options.num_slots}, max_seq_len={self.options.max_seq_len}:"
        )
        lines = lines_of(head, (*others, *self.parts()))
        if self.options.max_route_drafts and not self.options.plans_route_drafts and self.draft is not None:
            lines.append(
                f"  {_mib(self.route_draft_bytes):>10} MiB  more for each route with a draft of its own, at "
                f"most {self.options.max_route_drafts}, where so much is free then"
            )
        return lines if not self.note else [self.note, *lines]

    def fits(self, free: FreeMemory, *, with_optional: bool = False) -> bool:
        on_host, on_device = self._to_come(with_optional)
        if free.host_bytes is None:
            return on_host + on_device <= free.device_bytes
        return on_device <= free.device_bytes and on_host <= free.host_bytes

    def require_fit(self, free: FreeMemory) -> None:
        """Raises MemoryPlanError with the most slots, and the longest context, that would fit."""
        if self.fits(free):
            return
        on_host, on_device = self._to_come()
        there = f"{_mib(free.device_bytes)} MiB are free"
        needed = f"{_mib(on_host + on_device)} MiB more"
        if free.host_bytes is not None:
            needed = (
                f"{_mib(on_device)} MiB more of the device's memory and {_mib(on_host)} MiB of the host's"
            )
            there = f"{_mib(free.device_bytes)} and {_mib(free.host_bytes)} MiB are free"
        raise MemoryPlanError(
            f"num_slots={self.options.num_slots} with max_seq_len={self.options.max_seq_len} takes {needed}, "
            f"and {there}; {self._advice(free)}"
        )

    def _advice(self, free: FreeMemory) -> str:
        slots = _largest(self.options.num_slots, lambda count: self._with(num_slots=count).fits(free))
        length = _largest(self.options.max_seq_len, lambda tokens: self._with(max_seq_len=tokens).fits(free))
        fitting = [f"num_slots={slots} at this max_seq_len"] if slots >= 1 else []
        fitting += [f"max_seq_len={length} at this num_slots"] if length >= 2 else []
        if self._num_route_drafts and self._with(max_route_drafts=0).fits(free):
            routes = _largest(
                self.options.max_route_drafts, lambda n: self._with(max_route_drafts=n).fits(free)
            )
            fitting.append(f"max_route_drafts={routes} at both")
        if not fitting:
            return "no num_slots or max_seq_len alone makes it fit: a smaller model or dtype=bfloat16 may"
        return f"{' or '.join(fitting)} fits"

    def _with(self, **changes: Any) -> Self:
        return replace(self, options=replace(self.options, **changes))

    def _kv_bytes(self, model: ModelSize) -> int:
        """Includes the trash column."""
        return self.options.num_slots * (self.options.max_seq_len + 1) * model.column_bytes

    @property
    def _num_route_drafts(self) -> int:
        """Those that are planned; each is allocated when its route opens."""
        return self.options.max_route_drafts if self.options.plans_route_drafts else 0

    def _route_drafts_bytes(self) -> int:
        return self._num_route_drafts * self.route_draft_bytes

    def _to_come(self, with_optional: bool = False) -> tuple[int, int]:
        """(bytes always on the host, bytes where the models run), without what is allocated already."""
        coming: list[Part] = [
            part for part in self.parts() if not part.is_held and (with_optional or not part.is_optional)
        ]
        on_host = sum(part.num_bytes for part in coming if part.on_host)
        return on_host, sum(part.num_bytes for part in coming) - on_host


def lines_of(head: str, parts: Sequence[Part]) -> list[str]:
    """A heading, a line for each part, and their sum."""
    rows = [f"  {_mib(part.num_bytes):>10} MiB  {part.name}" for part in parts]
    return [head, *rows, f"  {_mib(sum(part.num_bytes for part in parts)):>10} MiB  in all"]


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number below `limit` that fits, 0 if none; more never fits where less does not."""
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f}"
