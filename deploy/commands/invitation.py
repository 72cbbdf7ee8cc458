"""What a running everdraft tells the person who started it: where it is and what to try."""

import shlex

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deploy.wiring import RunningSystem

TRY = '{{"model": "{model}", "prompt": "Once upon a time", "max_tokens": 32}}'


def invite(console: Console, system: RunningSystem) -> None:
    """Address, metrics and models as rows, then lines to copy."""
    settings = system.settings
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_row("endpoint", f"[bold]{system.url}/v1[/]")
    table.add_row("model", escape(settings.serving.served_name))
    table.add_row("draft", escape(settings.serving.draft or "none: nothing is sped up"))
    table.add_row("learner", "learns from the traffic" if system.learner else "off")
    table.add_row("metrics", f"{system.url}/metrics")
    lines = [curl_line(system)]
    if system.learner is not None and settings.tracking_uri:
        lines.append(mlflow_line(settings.tracking_uri))
    lines.append(f"everdraft status --state-dir {shlex.quote(str(settings.state_dir))}")
    console.print("", table, "", sep="\n")
    for line in lines:
        console.print(f"  {escape(line)}")
    console.print("\n[dim]Ctrl-C stops everything.[/]")


def curl_line(system: RunningSystem) -> str:
    body = TRY.format(model=system.settings.serving.served_name)
    needs_key = bool(system.settings.serving.api_keys)
    key = ' -H "Authorization: Bearer $EVERDRAFT_KEY"' if needs_key else ""
    return f"curl {system.url}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"


def mlflow_line(tracking_uri: str) -> str:
    """A server's own address, or the command that opens a database of runs."""
    if tracking_uri.startswith(("http://", "https://")):
        return f"open {tracking_uri}"
    return f"mlflow ui --backend-store-uri {shlex.quote(tracking_uri)} --port 5000"
