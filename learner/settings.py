"""The learner's settings, validated when they are read.

Knows no store, no model, no Ray. Invariant: an instance is frozen and every field is in range.
"""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

DivergenceName = Literal[
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "total_variation",
    "negative_log_acceptance",
    "tv_weighted_kl",
    "osd",
]

TrainableName = Literal["lora", "full"]

NEVER, NEVER_S = 10**9, 1e9
LOGITS_COPIES = 4
"""Held at once: logits, the tempered ones, their log-softmax and its gradient; see `bench memory`."""


class LearnerSettings(BaseModel):
    """Defaults suit the demo pair and are a safe start for real models."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # the trainable draft
    trainable: TrainableName | None = None
    """`full`: the draft's own weights are trained, or only those of `target_modules`. A version is then as
    large as these, in Redis (of a part of the target in bfloat16, else in float32) and in every checkpoint
    (there five times, with moments and mean). None: `full` for a part of the target, whose own weights are
    one block, `lora` for a draft model."""
    lora_rank: int = Field(32, ge=1)
    """Of every LoRA pair."""
    lora_alpha: float = Field(64.0, gt=0)
    """A pair's update is scaled by `lora_alpha / lora_rank`."""
    target_modules: tuple[str, ...] | None = None
    """Last parts of module names. None: under LoRA every linear layer, and embedding and head unless they are
    one weight; under `full` every weight."""
    seed: int = 0
    """Of the candidate's first weights, of draws of records and of the gate's resamples."""

    # one distillation step
    divergence: DivergenceName = "forward_kl"
    """What a step makes small, between target and draft at each position; see divergences.py."""
    jensen_shannon_beta: float = Field(0.5, gt=0, lt=1)
    """Of `jensen_shannon`: the target's share of the mixture."""
    greedy_temperature: float = Field(0.5, gt=0)
    """Temperature at which greedy and near-greedy requests are distilled; see distributions.py."""
    learning_rate: float = Field(3e-3, gt=0)
    """Suits the benchmark's small drafts, see LOG.md; a large draft may need less. The gate refuses a
    candidate that a high rate made worse."""
    warmup_steps: int = Field(10, ge=0)
    """The learning rate rises over the first steps, also after the candidate was restarted."""
    mean_over_steps: int = Field(60, ge=0)
    """The candidate is a running mean of the trained weights over about so many steps. 0: as trained."""
    max_grad_norm: float = Field(1.0, gt=0)
    """`inf`: no clipping."""
    records_per_step: int = Field(16, ge=1)
    """Fresh and replayed together."""
    replay_share: float = Field(0.5, ge=0, lt=1)
    """Share of a step's records that are drawn from all kept records, against forgetting."""
    rejected_suffix_weight: float = Field(0.0, ge=0)
    """Weight of positions after a first rejection (after a rejected draft token). 0 leaves them out: on the
    early demo pair they cost 60 % more time a step and gained nothing."""
    rejected_suffix_rounds_per_record: int = Field(2, ge=0)
    """At most so many rounds of a record give such positions."""
    rejected_suffix_context_tokens: int = Field(48, ge=1)
    """Tokens of context before such positions."""
    max_row_tokens: int = Field(1024, ge=2)
    """Longer contexts are cut from the left."""
    max_tokens_per_pass: int = Field(4096, ge=2)
    """Bounds a pass: padded tokens of all its rows."""
    max_logits_mib_per_pass: float = Field(512.0, gt=0)
    """Bounds a pass's logits, float32 over the vocabulary at each position that is learnt from, with all
    copies of them that a step or a score holds at once. A row is always taken whole."""

    # when to train
    min_records_per_cycle: int = Field(24, ge=1)
    """So many waiting records start a cycle."""
    max_record_age_s: float = Field(10.0, gt=0)
    """A cycle starts when enough records wait, or when the oldest has waited this long."""
    max_records_per_cycle: int = Field(256, ge=1)
    """Read at most for one cycle; the others wait."""
    passes_over_fresh: float = Field(4.0, gt=0)
    """How often a cycle's fresh records are seen, as far as `max_steps_per_cycle` allows."""
    max_steps_per_cycle: int = Field(16, ge=1)
    """Optimizer steps between two decisions."""
    max_busy_share: float = Field(0.7, gt=0, le=1)
    """Share of the time between two steps that may be spent computing; the rest is slept."""
    stall_gain: float = Field(0.01, ge=0)
    """Held-out acceptance; see `stall_decisions`."""
    stall_decisions: int = Field(6, ge=1)
    """Training slows, and then sleeps, if over so many scored decisions together it gained less held-out
    acceptance."""
    slow_stretch: int = Field(4, ge=1)
    """A slow cycle, and a probe, has so many times the usual records and steps."""
    first_rest_records: int = Field(192, ge=0)
    """Length of the first rest; see `max_rest_records`."""
    max_rest_records: int = Field(3072, ge=0)
    """Most records that are not trained on before a probe; their number doubles after each probe that is not
    promoted. 0: training neither slows nor sleeps."""
    shift_drop: float = Field(0.1, gt=0)
    """Fall of live acceptance that counts as a shift of traffic, after which training resumes."""

    # routes
    max_routes: int = Field(4, ge=0)
    """Drafts beside that of `default`, each with weights of its own in the learner and in every replica.
    0: one draft for everything."""
    route_min_records: int = Field(200, ge=1)
    """A route gets a draft of its own once it has had so many records; until then its records train
    `default`'s."""
    route_idle_s: float = Field(3600.0, gt=0)
    """A route without a record for so long is closed."""
    route_losses_before_close: int = Field(12, ge=1)
    """Decisions in a row in which a route's draft is not the best one for it: then the route is closed
    (`default`'s is), or starts again from another route's (if that one is)."""
    route_evidence_records: int = Field(64, ge=2)
    """All existing drafts are compared on so many of a route's last held-out records."""
    route_window_records: int = Field(2000, ge=1)
    """Number of latest prompts that are clustered, of two bytes a hidden unit each. A new route's first cycle
    trains on at most so many of its kept records."""
    route_review_records: int = Field(200, ge=1)
    """Prompts are clustered again after so many records."""

    # judging
    held_out_share: float = Field(0.2, gt=0, lt=1)
    """Share of requests, by a hash of their id, that judge and are never trained on."""
    held_out_window_records: int = Field(160, ge=1)
    """The latest held-out records, on which candidate, incumbent and floor are scored."""
    gate_min_records: int = Field(16, ge=2)
    """Fewer scored held-out records decide nothing."""
    gate_level: float = Field(0.05, gt=0, lt=0.5)
    """One-sided level: how often a candidate no better than the incumbent may pass one decision."""
    gate_min_gain: float = Field(0.0, ge=0)
    """The lower bound of the gain in acceptance over the incumbent must be above it."""
    gate_num_resamples: int = Field(1000, ge=100)
    """Of the bootstrap over records that gives the lower bound."""
    nominal_num_draft_tokens: int = Field(4, ge=0)
    """Used to predict speed until a replica reports the length in use."""
    refusals_before_reset: int = Field(12, ge=1)
    """After so many refusals in a row the candidate restarts from the incumbent."""
    quiet_after_publish_s: float = Field(0.5, ge=0)
    """Pause after a promotion, so that replicas on the same machine fetch, stage and swap undisturbed."""
    live_records_per_cycle: int = Field(32, ge=0)
    """Most records a cycle that are scored after a swap; 0: no live tests, no rollback."""
    live_trial_records: int = Field(16, ge=0)
    """A promotion is watched over so many records before the next one is allowed."""
    live_max_records: int = Field(400, ge=1)
    """After so many records the new draft is kept, and only the swap check continues, on an eighth of the
    records."""
    live_false_alarm: float = Field(0.05, gt=0, lt=1)
    """How often the comparison with the parent may roll back a draft that is just as good. That costs little;
    a slow rollback costs every round."""
    swap_false_alarm: float = Field(0.01, gt=0, lt=1)
    """Of the swap check: how often a swap that did what it said may raise an alarm."""
    swap_check_margin: float = Field(0.03, ge=0, le=0.2)
    """Observed acceptance may lie this far under the expected one without an alarm. On the demo pair the
    two agree within .003, under coupled sampling within .008."""

    # state and process
    checkpoint_folder: str = "learner-checkpoints"
    """Holds the learner's whole state; `everdraft` puts it into the state folder."""
    consumer_name: str = "learner"
    """Names this learner among those that share its records; machine and state folder are appended."""
    retry_s: float = Field(1.0, gt=0)
    """Pause before the store is tried again after it could not be reached."""
    num_threads: int = Field(1, ge=1)
    """Of the learner's process."""
    niceness: int = Field(10, ge=0, le=19)
    """Of the learner's process: replicas run at 0, and it gives way to them."""

    # tracking
    tracking_uri: str = ""
    """URI of MLflow; empty: no tracking."""
    experiment_name: str = "everdraft"
    """MLflow's experiment."""
    registered_model_name: str = "everdraft-draft"
    """Base name: each route's model is called `<name>-<target>-<revision>-<route>`."""

    def positions_per_pass(self, vocab_size: int) -> int:
        """Most positions of a pass over several rows."""
        return max(1, int(self.max_logits_mib_per_pass * 2**20) // (4 * vocab_size * LOGITS_COPIES))


def paper_setting(learning_rate: float = 1e-4) -> LearnerSettings:
    """Online Speculative Decoding as its authors ran it: one AdamW step on the whole draft every 8 requests,
    forward KL at temperature 1 where the draft was first rejected, each request used once, a constant rate,
    no clipping, no replay. The index is the right one, which their code misses by one token.

    Differences that remain: a held-out share that is not trained on, the gate, and a top-K target.
    """
    return LearnerSettings(
        trainable="full",
        divergence="osd",
        greedy_temperature=1.0,
        learning_rate=learning_rate,
        warmup_steps=0,
        mean_over_steps=0,
        max_grad_norm=math.inf,
        records_per_step=8,
        replay_share=0.0,
        rejected_suffix_weight=0.0,
        min_records_per_cycle=8,
        max_records_per_cycle=8,
        max_record_age_s=NEVER_S,
        passes_over_fresh=1.0,
        max_steps_per_cycle=1,
        max_rest_records=0,
        refusals_before_reset=NEVER,
        max_routes=0,
    )
