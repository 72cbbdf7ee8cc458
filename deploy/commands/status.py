"""`everdraft status`: the replicas, what they serve, and what their drafts are worth."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from buffer.records import FLOOR_VERSION, NGRAM_DRAFTER, DrafterCounts, ServingStatus
from buffer.store import AdapterFeed, RecordStore
from deploy.commands.console import (
    DEFAULT_STATE_DIR,
    RedisUrlOption,
    StateDirOption,
    output,
    plain_faults,
    redis_url_of,
    running_learner,
    running_note,
)
from deploy.commands.words import ago, milliseconds, percentage
from deploy.running import RunningNote

_WITHOUT_VERSION = {NGRAM_DRAFTER: "copied"}
_SUMMED = ("num_rounds", "num_drafted", "num_attempted", "num_accepted", "num_output_tokens")


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    state_dir: StateDirOption = DEFAULT_STATE_DIR,
    redis_url: RedisUrlOption = None,
) -> None:
    """What runs, which drafts serve, how well they are accepted; exit code 1 if no replica reports."""
    from deploy.wiring import open_feed, open_store

    with plain_faults():
        url = redis_url_of(state_dir, redis_url)
        feed, store = open_feed(url), open_store(url)
        try:
            statuses = sorted(feed.statuses(), key=lambda status: status.replica_id)
            learner = running_learner(state_dir)
            if as_json:
                output().print_json(json.dumps(_as_data(feed, store, statuses, learner)))
            else:
                _show(output(), feed, store, statuses, running_note(state_dir), learner)
        finally:
            store.close()
            feed.close()
    raise typer.Exit(0 if statuses else 1)


def _as_data(
    feed: AdapterFeed, store: RecordStore, statuses: list[ServingStatus], learner: dict[str, Any] | None
) -> dict[str, Any]:
    streams = store.keys()
    return {
        "replicas": [asdict(status) for status in statuses],
        "learner": learner,
        "routes": {route: _serving(feed, route) for route in feed.routes()},
        "streams": [{**asdict(key), **asdict(store.size(key))} for key in streams],
    }


def _show(
    console: Console,
    feed: AdapterFeed,
    store: RecordStore,
    statuses: list[ServingStatus],
    note: RunningNote | None,
    learner: dict[str, Any] | None,
) -> None:
    if note is not None:
        console.print(f"[bold]{note.url}[/]  target {note.target}, draft {note.draft or 'none'}\n")
    if statuses:
        for line in (line for status in statuses for line in _replica_lines(status)):
            console.print(line)
    else:
        console.print("no replica has reported lately")
    drafts = _drafts(statuses)
    if drafts.row_count:
        console.print("", drafts, "", sep="\n")
    if learner is not None:
        console.print(f"learner: {_learner_line(learner)}")
    for route in feed.routes():
        console.print(f"route {route}: {_route_line(feed, route)}")
    streams = store.keys()
    for key in streams:
        size = store.size(key)
        console.print(
            f"records of route {key.route}: {size.num_records} kept, {size.num_pending} being learned, "
            f"{size.num_dropped_records} dropped"
        )


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
    return line if pinned is None else f"{line}, pinned to {pinned}"


def _replica_lines(status: ServingStatus) -> Iterator[str]:
    serves = ", ".join(
        f"{_named(version)} on route {route}" for route, version in status.serving_versions.items()
    )
    yield f"replica {status.replica_id}, {ago(status.at_s, time.time())}: serves {serves or 'the floor'}"
    yield (
        f"  passes {status.passes or 'eager'}, draft length {status.num_draft_tokens}, "
        f"round {milliseconds(status.round_s_median)}, "
        f"{status.num_swaps} swaps ({status.num_swaps_under_load} under load, longest pause "
        f"{milliseconds(status.swap_pause_s_max)}), {status.num_dropped_records} records dropped"
    )
    if status.last_error:
        yield f"  [red]{escape(status.last_error)}[/]"


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
