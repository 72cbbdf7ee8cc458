"""The service under faults, in short: real processes, killed under real traffic. `make chaos` does all."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.chaos.commands import chaos_settings, table
from benchmarks.chaos.faults import Fault, faults
from benchmarks.chaos.measure import Chaos, Outcome
from benchmarks.chaos.service import Service, running_service
from benchmarks.chaos.traffic import Traffic
from benchmarks.options import DEMO_DRAFT, DEMO_TARGET
from tests.support.ports import free_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(3000)]

WAIT_S = 600.0
"""Not how long a thing takes, but after how long it is given up."""
SHORT = ("Redis: SIGKILL", "Redis: full", "learner: SIGKILL", "replica: SIGKILL")


def test_answers_records_and_learning_survive_what_is_killed(tmp_path: Path) -> None:
    """With a control: a fault that really loses records and requests is seen to."""
    chosen = {name: fault for name, fault in faults(hold_s=3.0).items() if name in SHORT}
    settings = chaos_settings(DEMO_TARGET, DEMO_DRAFT, 2)
    ports = (free_port(), free_port())
    with (
        running_service(settings, tmp_path, ports, print, start_s=400.0) as service,
        Traffic(service.url, service.model) as traffic,
    ):
        chaos = Chaos(service, traffic, print, recovery_s=WAIT_S, settle_s=WAIT_S)
        outcomes = list(chaos.run(chosen))
        [control] = chaos.run({"control": Fault(_forgets_its_records)})
    assert [one.fault for one in outcomes] == list(SHORT)
    for one in outcomes:
        assert not one.not_run
        assert one.num_requests > 0 and one.num_failed == 0, one
        assert one.recovered_after_s is not None, one
        assert one.num_lost == 0 and not one.left, one
    assert outcomes[-1].num_stored > 0
    assert control.num_lost == control.num_stored > 0


def _forgets_its_records(service: Service) -> None:
    service.on_redis(lambda client: client.flushall())


def test_the_table_says_what_was_not_run_and_what_was_wiped() -> None:
    console = Console(width=110, record=True, file=io.StringIO())
    outcomes = [
        Outcome("clock", not_run="no libfaketime"),
        Outcome("Redis: restarted empty", num_requests=7, num_lost=None, num_failed_on_dead_part=2),
        Outcome("learner: SIGKILL", num_stored=9, num_lost=1, recovered_after_s=12.34, left="+1 learner"),
    ]
    console.print(table(outcomes))
    clock, empty, learner = console.export_text().splitlines()[1:4]
    assert "not run: no libfaketime" in clock
    assert "0 of 7 + 2" in empty and "never" in empty and "wiped" in empty and "nothing" in empty
    assert "1 of 9" in learner and "12.3 s" in learner and "+1 learner" in learner
