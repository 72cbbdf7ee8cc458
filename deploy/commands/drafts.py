"""`everdraft drafts`: which drafts a route has had, which one serves, and taking that in hand."""

import time
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from buffer.administration import Administration, RouteDrafts
from buffer.names import DEFAULT_ROUTE, FLOOR_VERSION
from buffer.records import AdapterEvent, AdapterManifest
from deploy.commands.administration import administers
from deploy.commands.console import RouteOption, output
from deploy.commands.words import ago, decimals, sized

app = typer.Typer(help="Drafts by route: list, show, roll back, pin.", no_args_is_help=True)

VersionArgument = Annotated[int, typer.Argument(min=0, help="draft_version; 0 is the floor.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Goes into the route's history.")]
BY_HAND = "by an operator"


@app.command("list")
@administers
def list_drafts(
    admin: Administration,
    route: Annotated[str | None, typer.Option("--route", help="One route only; default: all.")] = None,
    events: Annotated[int, typer.Option(min=0, max=200, help="How many lines of history to show.")] = 8,
) -> None:
    """By route: the drafts that are kept, the one that serves, and what happened last and why."""
    every = admin.drafts(max_events=events)
    known = [drafts.route for drafts in every]
    if route is not None and route not in known:
        output().print(f"route {route}: the floor; no draft was ever judged. Routes: {', '.join(known)}")
    for drafts in (drafts for drafts in every if route in (None, drafts.route)):
        output().print(_versions(drafts))
        if events:
            output().print(_history(drafts.events))


@app.command()
@administers
def show(
    admin: Administration,
    version: VersionArgument,
    route: RouteOption = DEFAULT_ROUTE,
) -> None:
    """Everything known about one draft: what it fits, why it was let in, what became of it."""
    draft = admin.draft(route, version)
    for name, text in _details(draft.manifest):
        output().print(f"{name:<28}{text}")
    output().print(f"{'serves':<28}{'yes' if draft.is_serving else 'no'}")
    output().print(_history(draft.events))


@app.command()
@administers
def rollback(
    admin: Administration,
    to: Annotated[int | None, typer.Option(min=0, help="Version to go to; default: the parent.")] = None,
    reason: ReasonOption = BY_HAND,
    route: RouteOption = DEFAULT_ROUTE,
) -> None:
    """Go back to an earlier draft; the learner goes on and may promote a better one."""
    serving = admin.rollback(route, reason, to)
    output().print(f"route {route}: {_named(serving)} serves from now on")


@app.command()
@administers
def pin(
    admin: Administration,
    version: VersionArgument,
    reason: ReasonOption = BY_HAND,
    route: RouteOption = DEFAULT_ROUTE,
) -> None:
    """Serve this draft, whatever the learner promotes, until unpinned."""
    admin.pin(route, version, reason)
    output().print(f"route {route}: {_named(version)} is pinned")


@app.command()
@administers
def unpin(
    admin: Administration,
    reason: ReasonOption = BY_HAND,
    route: RouteOption = DEFAULT_ROUTE,
) -> None:
    """Let promotions take effect again."""
    serving = admin.unpin(route, reason)
    output().print(f"route {route}: no pin; {_named(serving)} serves from now on")


def _versions(drafts: RouteDrafts) -> Table:
    now_s = time.time()
    paused = ", whose learning is paused" if drafts.is_learning_paused else ""
    title = f"drafts of route {drafts.route}{paused}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("draft", "parent", "acceptance", "parent's", "records", "size", "made", ""):
        table.add_column(heading, justify="left" if heading in ("made", "") else "right", no_wrap=True)
    table.add_row("0", "", "", "", "", "", "", _mark(FLOOR_VERSION, drafts, "the floor"))
    for manifest in drafts.versions:
        table.add_row(*_version_cells(manifest, now_s), _mark(manifest.draft_version, drafts))
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


def _mark(version: int, drafts: RouteDrafts, name: str = "") -> Text:
    marks = [Text(name)] if name else []
    if version == drafts.serving_version:
        marks.append(Text("serves", "bold green"))
        if drafts.is_on_trial:
            marks.append(Text("on trial on one replica", "yellow"))
    if version == drafts.pinned_version:
        marks.append(Text("pinned", "yellow"))
    return Text(", ").join(marks)


def _history(events: Sequence[AdapterEvent]) -> Table:
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
