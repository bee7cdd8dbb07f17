"""Argo CD's view of a job's health, run by the Lua version that Argo CD speaks."""

from __future__ import annotations

import pytest
from lupa import lua51

from tests.support.manifests import REPOSITORY

SCRIPT = (REPOSITORY / "pipelines" / "gitops" / "argocd" / "health.lua").read_text()


def judge(status, generation=1):
    runtime = lua51.LuaRuntime()
    job = {"metadata": {"generation": generation}, "status": status}
    function = runtime.eval(f"function(obj) {SCRIPT} end")
    health = function(runtime.table_from(job, recursive=True))
    return health["status"], health["message"]


def build_status(*conditions, observed=1):
    entries = [{"type": kind, "status": state, "message": f"{kind} is {state}"} for kind, state in conditions]
    return {"observedGeneration": observed, "conditions": entries}


CASES = [
    ("no status yet", None, "Progressing"),
    ("no conditions yet", {"observedGeneration": 1}, "Progressing"),
    ("an older generation", build_status(("Ready", "True"), observed=0), "Progressing"),
    ("at work", build_status(("Ready", "False"), ("Reconciling", "True")), "Progressing"),
    ("served", build_status(("Ready", "True"), ("Reconciling", "False")), "Healthy"),
    ("stalled", build_status(("Ready", "False"), ("Stalled", "True")), "Degraded"),
    ("suspended", build_status(("Ready", "False"), ("Suspended", "True")), "Suspended"),
    ("resumed", build_status(("Suspended", "False"), ("Reconciling", "True")), "Progressing"),
]


@pytest.mark.parametrize(("status", "health"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_job_is(status, health):
    assert judge(status)[0] == health


def test_the_message_is_the_conditions_own():
    assert judge(build_status(("Stalled", "True"))) == ("Degraded", "Stalled is True")
