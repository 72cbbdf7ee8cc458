"""The end of the demo on one page: traffic, arms, swaps, what ran beside. Claims only what was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy.demo.comparison import ARMS, Comparison, verdict
from deploy.demo.corpus import DOMAINS
from deploy.demo.screen import DemoScreen
from deploy.demo.self_draft import DraftCosts
from deploy.demo.session import DemoResult, Phase

NONE = "-"


def summarise(console: Console, screen: DemoScreen, result: DemoResult, metrics: Mapping[str, Any]) -> None:
    """Tables, then sentences."""
    console.print("", screen.traffic_table(), "", sep="\n")
    for num_clients, comparison in result.comparisons.items():
        console.print(comparison_table(_title(num_clients, comparison), comparison))
        for sentence in (*gaps(comparison), speed_sentence(comparison), ""):
            console.print(sentence)
    for sentence in self_sentences(result):
        console.print(sentence)
    for sentence in (*conditions(result), *unpromoted(result.phases), *totals(metrics)):
        console.print(sentence)


def _title(num_clients: int, comparison: Comparison) -> str:
    clients = "1 client" if num_clients == 1 else f"{num_clients} clients"
    turns = "1 turn" if comparison.num_turns == 1 else f"{comparison.num_turns} turns"
    why = f" ({comparison.shortage})" if comparison.shortage else ""
    return f"held-out prompts, {clients}, {turns} of {len(comparison.arms)} arms{why}"


def comparison_table(title: str, comparison: Comparison) -> Table:
    """Acceptance and tokens a second of the arms, by domain; "-" where there is no figure."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), title_style="bold")
    table.add_column("domain", no_wrap=True)
    for column in ("floor", "adapted", "no speculation", "floor", "adapted", "speed-up", "faster"):
        table.add_column(column, justify="right", no_wrap=True)
    words = ("accepted", "accepted", *["tokens/s"] * 3, "", "of pairs")
    table.add_row("", *(Text(word, "dim") for word in words))
    for domain in DOMAINS:
        rates = [_cell(comparison.acceptance_rate(domain, arm), "{:.2f}") for arm in ("floor", "adapted")]
        speeds = [_cell(comparison.tokens_per_s(domain, arm), "{:.0f}") for arm in ARMS]
        ratios = comparison.ratios(domain)
        won = f"{sum(ratio > 1.0 for ratio in ratios)} of {len(ratios)}" if ratios else NONE
        table.add_row(domain, *rates, *speeds, _cell(comparison.speed_up(domain), "{:.2f}x"), won)
    return table


def _cell(figure: float | None, form: str) -> str:
    return NONE if figure is None else form.format(figure)


def gaps(comparison: Comparison) -> list[str]:
    """Why domains have no figures, one sentence a reason."""
    reasons: dict[str, list[str]] = {}
    for domain in DOMAINS:
        if why := comparison.why_not(domain, ARMS[0]):
            reasons.setdefault(why, []).append(domain)
    return [f"not measured: {', '.join(domains)} ({why})" for why, domains in reasons.items()]


def unpromoted(phases: Sequence[Phase]) -> list[str]:
    """In whose traffic no draft was promoted: its figures are of drafts that others' traffic made."""
    names = [phase.name for phase in phases if phase.name in DOMAINS and not phase.num_promotions]
    return [f"no draft was promoted during the traffic of {', '.join(names)}"] if names else []


def speed_sentence(comparison: Comparison) -> str:
    """What the paired ratios of all domains say of the adapted draft against no speculation."""
    ratios = comparison.ratios(*DOMAINS)
    if not ratios:
        reasons = dict.fromkeys(comparison.why_not(domain, "adapted") for domain in DOMAINS)
        return f"adapted against no speculation was not measured: {', '.join(reasons)}"
    won = f"more tokens a second in {sum(ratio > 1.0 for ratio in ratios)} of {len(ratios)} pairs"
    median = comparison.speed_up(*DOMAINS)
    return f"adapted against no speculation: {verdict(ratios)} ({won}, {median:.2f}x in the median one)"


def self_sentences(result: DemoResult) -> list[str]:
    """What a part of the target made of the same traffic, and what each draft costs."""
    arm, model = result.self_draft, result.draft_costs
    if arm is None:
        return []
    sentences = [
        f"{arm.part}, a part of the target, from nothing: {len(arm.acceptance)} of the traffic's "
        f"{arm.num_kept} records, {arm.num_promotions} drafts promoted"
    ]
    if arm.speed_up is None:
        sentences.append(f"{arm.part} against no speculation was not measured")
    else:
        rates = ", ".join(f"{domain} {rate:.2f}" for domain, rate in arm.rates.items())
        ratios = [ratio for domain in arm.ratios.values() for ratio in domain]
        sentences.append(
            f"  accepted on held-out prompts: {rates or NONE}; against no speculation in this process "
            f"({arm.passes}): {verdict(ratios)}, {arm.speed_up:.2f}x in the median of {len(ratios)} pairs; "
            f"{arm.num_identical} of {arm.num_compared} answers equal the target's own"
        )
    for name, costs in (("the draft model", model), (arm.part, arm.costs)):
        if costs is not None:
            sentences.append(f"  {name} costs {_costs(costs)}")
    return [*sentences, ""]


def _costs(costs: DraftCosts) -> str:
    return (
        f"{costs.learner_s:.0f} learner seconds, {2 * costs.weights_bytes / 1e6:.1f} MB of weights a "
        f"replica, {costs.column_bytes / 1e3:.1f} kB of keys and values a token, "
        f"{costs.adapter_bytes / 1e6:.2f} MB a version"
    )


def conditions(result: DemoResult) -> list[str]:
    """What the figures were measured under."""
    sentences = [f"while {name}, {load}" for name, load in result.loads.items()]
    if result.passes:
        changes = " -> ".join(dict.fromkeys(result.passes))
        sentences.append(f"the models' passes while measuring: {changes}")
    return sentences + result.caveats


def totals(metrics: Mapping[str, Any]) -> list[str]:
    """Requests, drafts, and whether any answer changed."""
    return [
        f"{metrics['num_requests']} requests, {metrics['num_failed_requests']} failed",
        f"drafts promoted: {metrics['num_promotions']}, swaps under load: {metrics['num_swaps_under_load']}; "
        + _pause(metrics["swap_pause_s_max"], metrics["round_s_median"]),
        _identity(metrics),
    ]


def _pause(pause_s: float | None, round_s: float | None) -> str:
    if pause_s is None or round_s is None:
        return "no draft was swapped in under load, so no pause was measured"
    return f"longest pause {1e3 * pause_s:.1f} ms, a median round takes {1e3 * round_s:.1f} ms"


def _identity(metrics: Mapping[str, Any]) -> str:
    fraction, num_unexplained = metrics["greedy_identical_fraction"], metrics["num_greedy_unexplained"]
    if fraction is None:
        return "no answer was compared with the target's own"
    unexplained = f", {num_unexplained} differ and were not looked into: no time" if num_unexplained else ""
    return (
        f"{fraction:.1%} of {metrics['num_greedy_compared']} greedy answers equal the target's own, "
        f"token by token ({metrics['num_greedy_near_ties']} near ties{unexplained})"
    )
