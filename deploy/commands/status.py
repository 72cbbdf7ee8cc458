"""`everdraft status`: the replicas, what they serve, and what their drafts are worth."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from buffer.controls import Controls
from buffer.names import FLOOR_VERSION, NGRAM_DRAFTER
from buffer.records import DrafterCounts, ServingStatus
from buffer.store import AdapterFeed, RecordStore
from deploy.commands.console import (
    DEFAULT_STATE_DIR,
    RedisUrlOption,
    StateDirOption,
    memory_url_of,
    output,
    plain_faults,
    redis_url_of,
    running_learner,
    running_note,
)
from deploy.commands.targets import SHOWN, TargetOption, targets_meant
from deploy.commands.words import ago, milliseconds, orders_in_words, percentage
from deploy.running import RunningNote
from deploy.terminal import visible

_WITHOUT_VERSION = {NGRAM_DRAFTER: "copied"}
_SUMMED = ("num_rounds", "num_drafted", "num_attempted", "num_accepted", "num_output_tokens")


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    state_dir: StateDirOption = DEFAULT_STATE_DIR,
    redis_url: RedisUrlOption = None,
    target_revision: TargetOption = None,
) -> None:
    """What runs, which drafts serve, how well they are accepted; exit code 1 if no replica reports."""
    from deploy.wiring import open_feed, open_store

    with plain_faults(), ExitStack() as opened:
        url = redis_url_of(state_dir, redis_url)
        store = opened.enter_context(closing(open_store(url, memory_url_of(state_dir, url))))
        targets = []
        for revision in targets_meant(url, state_dir, target_revision):
            feed = opened.enter_context(closing(open_feed(url, revision)))
            targets.append(TargetFeed(revision, feed, feed.statuses()))
        learner = running_learner(state_dir)
        if as_json:
            output().print_json(json.dumps(_as_data(targets, store, learner)), ensure_ascii=True)
        else:
            _show(output(), targets, store, running_note(state_dir), learner)
    raise typer.Exit(0 if any(target.statuses for target in targets) else 1)


@dataclass(frozen=True)
class TargetFeed:
    """One target's drafts and replicas."""

    revision: str
    feed: AdapterFeed
    statuses: list[ServingStatus]


def _as_data(targets: list[TargetFeed], store: RecordStore, learner: dict[str, Any] | None) -> dict[str, Any]:
    meant = {target.revision for target in targets}
    known = store.keys()
    return {
        "replicas": [
            {"target_revision": target.revision, **asdict(status)}
            for target in targets
            for status in target.statuses
        ],
        "learner": learner,
        "routes": {
            target.revision: {route: _serving(target.feed, route) for route in target.feed.routes()}
            for target in targets
        },
        "controls": {target.revision: asdict(_controls(target.feed)) for target in targets},
        "streams": [
            {**asdict(key), **asdict(store.size(key))} for key in known if key.target_revision in meant
        ],
    }


def _show(
    console: Console,
    targets: list[TargetFeed],
    store: RecordStore,
    note: RunningNote | None,
    learner: dict[str, Any] | None,
) -> None:
    if note is not None:
        models = visible(f"  target {note.target}, draft {note.draft or 'none'}")
        console.print(Text.assemble((visible(note.url), "bold"), models), "", sep="\n")
    if not targets:
        console.print("no replica has reported lately")
    for target in targets:
        if len(targets) > 1:
            console.print(Text(visible(f"target {target.revision[:SHOWN]}"), "bold"))
        _show_target(console, target, store)
    if learner is not None:
        console.print(f"learner: {_learner_line(learner)}")


def _show_target(console: Console, target: TargetFeed, store: RecordStore) -> None:
    feed, statuses = target.feed, target.statuses
    if statuses:
        for line in (line for status in statuses for line in _replica_lines(status)):
            console.print(line)
    else:
        console.print("no replica has reported lately")
    drafts = _drafts(statuses)
    if drafts.row_count:
        console.print("", drafts, "", sep="\n")
    for route in feed.routes():
        console.print(f"route {route}: {_route_line(feed, route)}")
    if (controls := _controls(feed)) != Controls():
        for sentence in orders_in_words(controls):
            console.print(sentence)
    known = store.keys()
    for key in [key for key in known if key.target_revision == target.revision]:
        size = store.size(key)
        console.print(
            f"records of route {key.route}: {size.num_records} kept, {size.num_pending} being learned, "
            f"{size.num_dropped_records} dropped"
        )


def _controls(feed: AdapterFeed) -> Controls:
    return feed.controls() or Controls()


def _learner_line(learner: dict[str, Any]) -> str:
    line = str(learner["state"])
    if "num_steps" in learner:
        line += f", {learner['num_steps']} steps, {learner['num_records_seen']} records seen"
    decision = learner.get("last_decision")
    if decision:
        line += (
            f"; last: {decision['kind'].replace('_', ' ')} {decision['draft_version']}, {decision['reason']}"
        )
    return line


def _route_line(feed: AdapterFeed, route: str) -> str:
    serving, pinned = _serving(feed, route), feed.pinned(route)
    line = f"{_named(serving)} serves, {feed.last_version(route)} promoted so far"
    if pinned is not None:
        return f"{line}, pinned to {pinned}"
    return f"{line}, on trial on one replica" if feed.is_on_trial(route) else line


def _replica_lines(status: ServingStatus) -> Iterator[str | Text]:
    serves = ", ".join(
        f"{_named(version)} on route {route}" for route, version in status.serving_versions.items()
    )
    yield f"replica {status.replica_id}, {ago(status.at_s, time.time())}: serves {serves or 'the floor'}"
    yield (
        f"  passes {status.passes or 'eager'}, draft length {status.num_draft_tokens}, "
        f"round {milliseconds(status.round_s_median)}, "
        f"{status.num_swaps} swaps ({status.num_swaps_under_load} under load, longest pause "
        f"{milliseconds(status.swap_pause_s_max)}), {status.num_dropped_records} records dropped, "
        f"{status.num_rerouted_records} kept as default's"
    )
    if status.last_error:
        yield Text(visible(f"  {status.last_error}"), "red")


def _drafts(statuses: list[ServingStatus]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("route", "draft", "acceptance", "tokens per target pass", "output tokens"):
        table.add_column(heading, justify="left" if heading == "route" else "right", no_wrap=True)
    for counts in _summed(statuses):
        per_pass = f"{counts.num_output_tokens / counts.num_rounds:.2f}" if counts.num_rounds else "-"
        table.add_row(
            counts.route,
            _drafter(counts),
            percentage(counts.num_accepted, counts.num_attempted),
            per_pass,
            str(counts.num_output_tokens),
        )
    return table


def _summed(statuses: list[ServingStatus]) -> list[DrafterCounts]:
    """Over all replicas, one of each route, drafter and version, in this order."""
    total: dict[tuple[str, str, int], DrafterCounts] = {}
    for each in (counts for status in statuses for counts in status.counts):
        identity = each.route, each.drafter_id, each.draft_version or 0
        before = total.get(identity)
        sums = {name: getattr(each, name) + getattr(before, name, 0) for name in _SUMMED}
        total[identity] = replace(each, **sums)
    return [total[identity] for identity in sorted(total)]


def _drafter(counts: DrafterCounts) -> str:
    if counts.draft_version is None:
        return _WITHOUT_VERSION.get(counts.drafter_id, counts.drafter_id)
    return "0 (floor)" if counts.draft_version == FLOOR_VERSION else str(counts.draft_version)


def _named(version: int) -> str:
    return "the floor" if version == FLOOR_VERSION else f"draft {version}"


def _serving(feed: AdapterFeed, route: str) -> int:
    latest = feed.latest(route)
    return latest.draft_version if latest is not None else FLOOR_VERSION
