"""The only types that cross a process. Plain data: numpy arrays, numbers, strings; no torch, no I/O.

Legend: G drafted tokens of a round, E = G + 1 verified positions, C tokens the round emitted
(accepted drafts, then the recovered or bonus token, cut at the end of the generation), K kept entries.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from buffer.names import FLOOR_VERSION, MODEL_DRAFTER


@dataclass(frozen=True, eq=False)
class RoundTrace:
    """What one round drafted and accepted, and the target's log-probabilities at every verified position.

    `start` is the index, in prompt + output, of the token that verified position 0 decides. Position e is
    conditioned on everything before `start` and on `drafted_token_ids_G[:e]`; positions past `num_accepted`
    are therefore conditioned on draft tokens that were rejected.
    """

    start: int
    drafter_id: str
    """The drafter's name. A reader takes a name that it does not know for something other than a draft model.
    A round of draft length 0 names the draft that was loaded."""
    draft_route: str | None
    """The route whose draft model drafted; not the record's own route if that has no draft. None if the
    drafter has no trained weights."""
    draft_version: int | None
    """Version of these weights, counted by route. None if they have no versions, and in rounds of schema 1
    that another route's draft drafted, because schema 1 did not store it."""
    num_accepted: int
    num_attempted: int
    drafted_token_ids_G: NDArray[np.int32]
    drafted_target_logprobs_G: NDArray[np.float32]
    """Final distribution of the target at the drafted tokens; -inf where it excludes them."""
    drafted_draft_logprobs_G: NDArray[np.float32]
    """Log-probability of the drafted tokens under the distribution they were drawn from; 0 if that is one-hot
    (greedy or copied)."""
    emitted_target_logprobs_C: NDArray[np.float32]
    """Final distribution of the target at the tokens the round emitted."""
    topk_token_ids_EK: NDArray[np.int32]
    topk_logprobs_EK: NDArray[np.float16]
    """The target's raw log-probabilities at temperature 1, largest first."""
    retemper_E: NDArray[np.float32]
    """logsumexp(logits) / T - logsumexp(logits / T): `logprob / T + retemper` is the exact
    log-probability at temperature T. 0 when greedy."""

    @property
    def num_drafted(self) -> int:
        return len(self.drafted_token_ids_G)

    @property
    def is_by_draft(self) -> bool:
        """Whether a draft model drafted, of any route and version."""
        return self.drafter_id == MODEL_DRAFTER

    def is_by(self, route: str, draft_version: int) -> bool:
        """Whether this version of the route's draft drafted. The floor is the same draft on all routes."""
        own = self.draft_route == route or draft_version == FLOOR_VERSION
        return self.is_by_draft and own and self.draft_version == draft_version


@dataclass(frozen=True)
class RecordSampling:
    """The distribution under which a generation was sampled. temperature 0 is greedy; top_k 0 is off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    mode: str = "standard"
    """`greedy`, `standard` or `coupled`."""
    context_dependent: bool = False
    """Penalties or logit bias were on: the record is kept out of the gate."""


@dataclass(frozen=True, eq=False)
class GenerationRecord:
    """One finished or cancelled generation, or one segment of a long one.

    A later segment carries the whole context before it as its prompt, so each record stands alone.
    """

    record_id: str
    request_id: str
    route: str
    target_revision: str
    sampling: RecordSampling
    prompt_token_ids: NDArray[np.int32]
    output_token_ids: NDArray[np.int32]
    rounds: tuple[RoundTrace, ...]
    created_at_s: float
    """Unix time."""
    expires_at_s: float
    """Unix time after which the record may not be read."""
    replica_id: str = ""
    segment: int = 0
    prompt_embedding_H: NDArray[np.float16] | None = None
    """The target's last hidden state, averaged over the prompt's tokens (in every segment, over the request's
    own prompt). Prompts are routed by it. None: it was not computed."""
    isolated: bool = False
    """Its route serves one tenant alone: the record may train the draft of that route, and no other."""

    @property
    def num_positions(self) -> int:
        """Verified positions, those after a first rejection included."""
        return sum(trace.num_drafted + 1 for trace in self.rounds)


@dataclass(frozen=True)
class AdapterManifest:
    """One promoted adapter: the models it fits, its size and hash, and why the gate passed it."""

    route: str
    draft_version: int
    parent_version: int
    """The version of the incumbent that it was judged against; a rollback goes there."""
    draft_id: str
    """The base draft's name, for people."""
    draft_revision: str
    """sha256 over the base draft's weights; a replica refuses another base."""
    target_revision: str
    rank: int
    """0 means full weights instead of LoRA; `alpha` is 0 too."""
    alpha: float
    target_modules: tuple[str, ...]
    """For full weights, empty if every weight was trained."""
    adapter_config_json: str
    """PEFT's adapter_config.json, so that any tool can load the adapter; for full weights it says that they
    are full weights."""
    sha256: str
    """Hash of the safetensors bytes."""
    num_bytes: int
    created_at_s: float
    mlflow_run_id: str = ""
    evidence: Mapping[str, float] = field(default_factory=dict)
    """The gate's figures, e.g. candidate and incumbent acceptance, lower bound of the gain."""
    num_records_seen: int = 0


SERVING_CHANGES = ("promoted", "rolled_back", "pinned", "unpinned", "adopted")
"""Kinds of events and decisions after which another draft may serve. `adopted`: the feed's history has no
event for it."""


@dataclass(frozen=True)
class AdapterEvent:
    """One line of a route's history."""

    kind: str
    """`promoted`, `confirmed`, `refused`, `rolled_back`, `pinned`, `unpinned`, `rejected_by_replica`;
    of a route, `opened` and `closed`."""
    route: str
    draft_version: int
    """`refused`: the version that the candidate would have had; `rejected_by_replica`: the version that was
    rejected; else the version that serves afterwards."""
    reason: str
    at_s: float
    evidence: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PassCosts:
    """Measured seconds of one forward pass: rows by batch size, columns by tokens per sequence."""

    batch_sizes: tuple[int, ...]
    token_counts: tuple[int, ...]
    target_pass_s: tuple[tuple[float, ...], ...]
    """[batch][tokens]"""
    draft_pass_s: tuple[float, ...]
    """[batch], one token a sequence"""
    draft_start_s: tuple[float, ...]
    """[batch], extra seconds of the first draft pass of a round"""


@dataclass(frozen=True)
class DrafterCounts:
    """Counters of the rounds that one drafter took part in, with one version of its weights, since the
    replica started."""

    drafter_id: str
    route: str
    """Route of the draft that was loaded, also if another drafter drafted in its place."""
    draft_version: int | None
    """None where the drafter's weights have no versions."""
    num_rounds: int = 0
    num_drafted: int = 0
    num_attempted: int = 0
    num_accepted: int = 0
    num_output_tokens: int = 0

    def __post_init__(self) -> None:
        if self.draft_version is not None and self.draft_version < 0:
            raise ValueError(f"draft_version={self.draft_version} is negative; it names no version")


@dataclass(frozen=True)
class ServingStatus:
    """What a replica reports to the learner and the operator, about once a second."""

    replica_id: str
    at_s: float
    serving_versions: Mapping[str, int]
    """route -> draft_version that serves now, of every route that has a draft of its own."""
    counts: tuple[DrafterCounts, ...]
    """No two of the same drafter, route and version."""
    costs: PassCosts | None = None
    mean_batch_size: float = 1.0
    num_draft_tokens: int = 0
    """The model's draft length in the last round."""
    is_draft_length_fixed: bool = False
    """True if a setting fixes it; else the replica chooses it."""
    num_dropped_records: int = 0
    num_rerouted_records: int = 0
    """Records stored under `default` because there was no room for a stream of their route."""
    num_swaps: int = 0
    num_swaps_under_load: int = 0
    swap_pause_s_max: float = 0.0
    round_s_median: float = 0.0
    passes: str = ""
    """How the models' passes run: compiled, or eager and why."""
    last_error: str = ""
