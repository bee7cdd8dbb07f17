"""The operator is killed before and after every single write, and two copies work at once: the end is the same.

Runs the real Cluster and Reconciler on an API server in memory; `tests/api` kills the real process on the real one.
"""

from __future__ import annotations

import asyncio
import datetime
import random

import pytest

from finetune_operator.cluster import Cluster
from finetune_operator.errors import ConflictError
from finetune_operator.progress import ProgressStore
from finetune_operator.reconcile import Reconciler
from tests.support.memory_api import MemoryApi, OperatorKilledError
from tests.support.operator_parts import make_body, make_settings

KEY = ("team-a", "support-7b")
FAILING = ("support-7b-train-1",)
EXPECTED_JOBS = ["inspect", "prepare", "train-1", "train-2", "promote", "evaluate", "publish", "compose", "smoke"]
SPEC = {
    "promotion": {"destinations": [{"destination": "s3://bucket/models"}]},
    "inference": {"adapters": [{"name": "polite", "source": "s3://bucket/polite"}]},
    "resources": {"gpusPerNode": 0},
}


class Clock:
    """Moves an hour per look, so that no backoff holds a test up."""

    def __init__(self) -> None:
        self.now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)

    def __call__(self) -> datetime.datetime:
        self.now += datetime.timedelta(hours=1)
        return self.now


def make_api(**spec) -> MemoryApi:
    api = MemoryApi()
    api._store("finetunejobs", KEY[1], make_body(**{**SPEC, **spec}))
    return api


def make_reconciler(api: MemoryApi, clock: Clock) -> Reconciler:
    return Reconciler(Cluster(api), make_settings(), ProgressStore(clock()), "PEM", clock)


async def run_to_the_end(api: MemoryApi, clock: Clock) -> int:
    """Run passes, with a new operator after each kill, until the job has finished; return the number of kills."""
    kills = 0
    reconciler = make_reconciler(api, clock)
    for _ in range(60):
        try:
            await reconciler.reconcile(KEY)
        except ConflictError:
            continue
        except OperatorKilledError:
            kills += 1
            api.kill_at = None
            reconciler = make_reconciler(api, clock)
            continue
        api.play(FAILING)
        if is_finished(api):
            return kills
    raise AssertionError(f"never finished: {api.find('finetunejobs', KEY[1]).get('status')}")


def is_finished(api: MemoryApi) -> bool:
    status = api.find("finetunejobs", KEY[1]).get("status") or {}
    return status.get("state") in ("Succeeded", "Failed")


def name_job(name: str) -> str:
    """Return the name of a Job without that of what it belongs to: a job, or a version of an endpoint."""
    if name.endswith("-smoke"):
        return "smoke"
    short = name.removeprefix("support-7b-")
    return "compose" if short.startswith("compose-") else short


def summarise(api: MemoryApi) -> dict:
    """Return what must not depend on when the operator was killed."""
    status = api.find("finetunejobs", KEY[1])["status"]
    return {
        "state": status["state"],
        "restarts": (status["restarts"], status["restartsCountTowardsMax"]),
        "attempts": [(each["number"], each["reason"]) for each in status["attempts"]],
        "created": [name_job(name) for name in api.created],
        "objects": {kind: api.names(kind) for kind in ("jobs", "configmaps", "services", "deployments", "pods")},
        "version": status["serving"]["version"],
    }


def run_once(kill_at: tuple[int, str] | None = None) -> tuple[MemoryApi, int]:
    api = make_api()
    api.kill_at = kill_at
    kills = asyncio.run(run_to_the_end(api, Clock()))
    return api, kills


@pytest.fixture(scope="module")
def undisturbed() -> MemoryApi:
    return run_once()[0]


def test_an_undisturbed_job_makes_every_job_once_and_in_order(undisturbed):
    assert summarise(undisturbed)["created"] == EXPECTED_JOBS
    assert summarise(undisturbed)["restarts"] == (1, 1)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_operator_killed_at_any_write_ends_as_if_it_had_lived(undisturbed, moment):
    assert undisturbed.writes > 30
    for number in range(1, undisturbed.writes + 1):
        api, kills = run_once((number, moment))
        assert kills == 1, f"no kill at write {number}"
        assert summarise(api) == summarise(undisturbed), f"killed {moment} write {number}"


@pytest.mark.parametrize("seed", range(40))
def test_two_copies_at_once_make_nothing_twice(undisturbed, seed):
    api, clock, chance = make_api(), Clock(), random.Random(seed)

    async def give_way() -> None:
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)

    async def work(reconciler: Reconciler) -> None:
        for _ in range(200):
            try:
                await reconciler.reconcile(KEY)
            except ConflictError:
                await asyncio.sleep(0)
            api.play(FAILING)
            if is_finished(api):
                return

    async def both() -> None:
        api.on_request = give_way
        await asyncio.gather(*(work(make_reconciler(api, clock)) for _ in range(2)))

    asyncio.run(both())
    assert summarise(api) == summarise(undisturbed)


def test_a_finished_job_does_nothing_more_even_when_its_children_are_gone(undisturbed):
    api, clock = run_once()[0], Clock()
    for kind in ("jobs", "pods"):
        for name in api.names(kind):
            api.objects.pop((kind, name))
    created = list(api.created)
    asyncio.run(make_reconciler(api, clock).reconcile(KEY))
    assert api.created == created
    assert api.names("jobs") == []


def test_a_restarted_operator_whose_status_was_lost_writes_it_again(undisturbed):
    api, clock = run_once()[0], Clock()
    before = api.find("finetunejobs", KEY[1]).pop("status")
    asyncio.run(make_reconciler(api, clock).reconcile(KEY))
    after = api.find("finetunejobs", KEY[1])["status"]
    volatile = ("conditions",)
    assert {name: value for name, value in after.items() if name not in volatile} == {
        name: value for name, value in before.items() if name not in volatile
    }
