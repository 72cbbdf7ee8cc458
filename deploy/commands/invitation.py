"""What a running everdraft tells the person who started it: where it is and what to try."""

import shlex

from rich.console import Console
from rich.table import Table
from rich.text import Text

from buffer.redaction import redacted_url
from deploy.terminal import visible
from deploy.wiring import RunningSystem

TRY = '{{"model": "{model}", "prompt": "Once upon a time", "max_tokens": 32}}'


def invite(console: Console, system: RunningSystem) -> None:
    """Address, metrics and models as rows, then lines to copy."""
    settings = system.settings
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_row("endpoint", Text(visible(f"{system.url}/v1"), "bold"))
    table.add_row("model", ", ".join(settings.serving.served_names))
    table.add_row("draft", settings.serving.draft or "none: nothing is sped up")
    table.add_row("learner", "learns from the traffic" if system.learner else "off")
    table.add_row("metrics", f"{system.url}/metrics")
    lines = [curl_line(system)]
    if system.learner is not None and settings.tracking_uri:
        lines.append(mlflow_line(settings.tracking_uri))
    lines.append(f"everdraft status --state-dir {shlex.quote(str(settings.state_dir))}")
    console.print("", table, "", sep="\n")
    for line in lines:
        console.print(f"  {line}")
    console.print()
    console.print("Ctrl-C stops everything.", style="dim")


def curl_line(system: RunningSystem) -> str:
    body = TRY.format(model=system.settings.serving.served_name)
    serving = system.settings.serving
    needs_key = bool(serving.api_keys or serving.tenants)
    key = ' -H "Authorization: Bearer $EVERDRAFT_KEY"' if needs_key else ""
    return f"curl {system.url}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"


def mlflow_line(tracking_uri: str) -> str:
    """A server's own address, or the command that opens a database of runs; neither with its password."""
    if not tracking_uri.startswith("sqlite:"):
        tracking_uri = redacted_url(tracking_uri)
    if tracking_uri.startswith(("http://", "https://")):
        return f"open {tracking_uri}"
    return f"mlflow ui --backend-store-uri {shlex.quote(tracking_uri)} --port 5000"
