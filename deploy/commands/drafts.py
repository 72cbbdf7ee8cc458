"""`everdraft drafts`: which drafts a route has had, which one serves, and taking that in hand."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from buffer.names import DEFAULT_ROUTE, FLOOR_VERSION
from buffer.records import AdapterEvent, AdapterManifest
from buffer.store import AdapterFeed
from deploy.commands.console import (
    DEFAULT_STATE_DIR,
    RedisUrlOption,
    RouteOption,
    StateDirOption,
    output,
    plain_faults,
    redis_url_of,
)
from deploy.commands.targets import TargetOption, target_meant
from deploy.commands.words import ago, decimals, sized
from learner.tracking.report_text import SERVING_CHANGES

app = typer.Typer(help="Drafts by route: list, show, roll back, pin.", no_args_is_help=True)

VersionArgument = Annotated[int, typer.Argument(min=0, help="draft_version; 0 is the floor.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Goes into the route's history.")]
BY_HAND = "by an operator"


@contextmanager
def opened_feed(
    state_dir: StateDirOption, redis_url: str | None, target_revision: str | None
) -> Iterator[AdapterFeed]:
    from deploy.wiring import open_feed

    with plain_faults():
        url = redis_url_of(state_dir, redis_url)
        feed = open_feed(url, target_meant(url, state_dir, target_revision))
        try:
            yield feed
        finally:
            feed.close()


@app.command("list")
def list_drafts(
    route: Annotated[str | None, typer.Option("--route", help="One route only; default: all.")] = None,
    events: Annotated[int, typer.Option(min=0, help="How many lines of history to show.")] = 8,
    state_dir: StateDirOption = DEFAULT_STATE_DIR,
    redis_url: RedisUrlOption = None,
    target_revision: TargetOption = None,
) -> None:
    """By route: the drafts that are kept, the one that serves, and what happened last and why."""
    with opened_feed(state_dir, redis_url, target_revision) as feed:
        known = feed.routes()
        if route is not None and route not in known:
            output().print(f"route {route}: the floor; no draft was ever judged. Routes: {', '.join(known)}")
            return
        for name in [route] if route is not None else known or [DEFAULT_ROUTE]:
            output().print(_versions(feed, name))
            if events:
                output().print(_history(feed.history(name, events)))


@app.command()
def show(
    version: VersionArgument,
    route: RouteOption = DEFAULT_ROUTE,
    state_dir: StateDirOption = DEFAULT_STATE_DIR,
    redis_url: RedisUrlOption = None,
    target_revision: TargetOption = None,
) -> None:
    """Everything known about one draft: what it fits, why it was let in, what became of it."""
    with opened_feed(state_dir, redis_url, target_revision) as feed:
        for name, text in _details(feed.manifest(route, version)):
            output().print(f"{name:<28}{text}")
        latest = feed.latest(route)
        serves = latest is not None and latest.draft_version == version
        output().print(f"{'serves':<28}{'yes' if serves else 'no'}")
        output().print(_history(list(_concerning(version, feed.history(route)))))


@app.command()
def rollback(
    to: Annotated[int | None, typer.Option(min=0, help="Version to go to; default: the parent.")] = None,
    reason: ReasonOption = BY_HAND,
    route: RouteOption = DEFAULT_ROUTE,
    state_dir: StateDirOption = DEFAULT_STATE_DIR,
    redis_url: RedisUrlOption = None,
    target_revision: TargetOption = None,
) -> None:
    """Go back to an earlier draft; the learner goes on and may promote a better one."""
    with opened_feed(state_dir, redis_url, target_revision) as feed:
        serving = feed.rollback(route, reason, to)
        output().print(f"route {route}: {_named(serving)} serves from now on")


@app.command()
def pin(
    version: VersionArgument,
    reason: ReasonOption = BY_HAND,
    route: RouteOption = DEFAULT_ROUTE,
    state_dir: StateDirOption = DEFAULT_STATE_DIR,
    redis_url: RedisUrlOption = None,
    target_revision: TargetOption = None,
) -> None:
    """Serve this draft, whatever the learner promotes, until unpinned."""
    with opened_feed(state_dir, redis_url, target_revision) as feed:
        feed.pin(route, version, reason)
        output().print(f"route {route}: {_named(version)} is pinned")


@app.command()
def unpin(
    reason: ReasonOption = BY_HAND,
    route: RouteOption = DEFAULT_ROUTE,
    state_dir: StateDirOption = DEFAULT_STATE_DIR,
    redis_url: RedisUrlOption = None,
    target_revision: TargetOption = None,
) -> None:
    """Let promotions take effect again."""
    with opened_feed(state_dir, redis_url, target_revision) as feed:
        serving = feed.unpin(route, reason)
        output().print(f"route {route}: no pin; {_named(serving)} serves from now on")


def _versions(feed: AdapterFeed, route: str) -> Table:
    latest, pinned, now_s = feed.latest(route), feed.pinned(route), time.time()
    serving = latest.draft_version if latest is not None else FLOOR_VERSION
    on_trial = feed.is_on_trial(route)
    table = Table(title=f"drafts of route {route}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("draft", "parent", "acceptance", "parent's", "records", "size", "made", ""):
        table.add_column(heading, justify="left" if heading in ("made", "") else "right", no_wrap=True)
    table.add_row("0", "", "", "", "", "", "", _mark(FLOOR_VERSION, serving, pinned, name="the floor"))
    for manifest in feed.versions(route):
        table.add_row(
            *_version_cells(manifest, now_s), _mark(manifest.draft_version, serving, pinned, on_trial)
        )
    return table


def _version_cells(manifest: AdapterManifest, now_s: float) -> tuple[str, ...]:
    evidence = manifest.evidence
    return (
        str(manifest.draft_version),
        str(manifest.parent_version),
        decimals(evidence.get("acceptance_candidate")),
        decimals(evidence.get("acceptance_incumbent")),
        str(manifest.num_records_seen),
        sized(manifest.num_bytes),
        ago(manifest.created_at_s, now_s),
    )


def _mark(version: int, serving: int, pinned: int | None, on_trial: bool = False, name: str = "") -> Text:
    marks = [Text(name)] if name else []
    if version == serving:
        marks.append(Text("serves", "bold green"))
        if on_trial and pinned is None:
            marks.append(Text("on trial on one replica", "yellow"))
    if version == pinned:
        marks.append(Text("pinned", "yellow"))
    return Text(", ").join(marks)


def _concerning(version: int, events: list[AdapterEvent]) -> Iterator[AdapterEvent]:
    """What happened to a draft, what made another one serve in its place included."""
    served = FLOOR_VERSION
    for event in events:
        if version in (event.draft_version, served if event.kind in SERVING_CHANGES else None):
            yield event
        served = event.draft_version if event.kind in SERVING_CHANGES else served


def _history(events: list[AdapterEvent]) -> Table:
    now_s = time.time()
    table = Table(title="history", title_justify="left", box=None, padding=(0, 2, 0, 0), show_header=False)
    for event in events:
        kind = event.kind.replace("_", " ")
        table.add_row(ago(event.at_s, now_s), kind, str(event.draft_version), event.reason)
    return table


def _details(manifest: AdapterManifest) -> Iterator[tuple[str, str]]:
    for name in ("route", "draft_version", "parent_version", "draft_id", "draft_revision", "target_revision"):
        yield name, str(getattr(manifest, name))
    kind = f"rank {manifest.rank}, alpha {manifest.alpha:g}" if manifest.rank else "full weights"
    yield "adapter", f"{kind}, {sized(manifest.num_bytes)}"
    yield "target_modules", ", ".join(manifest.target_modules) or "all"
    yield "sha256", manifest.sha256
    yield "made", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.created_at_s))
    yield "num_records_seen", str(manifest.num_records_seen)
    yield "mlflow_run_id", manifest.mlflow_run_id or "none"
    for name, figure in manifest.evidence.items():
        yield name, f"{figure:.4g}"


def _named(version: int) -> str:
    return "the floor" if version == FLOOR_VERSION else f"draft {version}"
