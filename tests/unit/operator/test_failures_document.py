"""What operator/docs/failures.md promises of each class is what happens, and its rules are valid."""

from __future__ import annotations

import pathlib
import re

import pytest
import yaml

from finetune_contract.reports import Reason
from finetune_operator.api.v1alpha1 import FailurePolicy
from finetune_operator.plan import FailurePlan
from finetune_operator.policies.failure import explain_pod
from finetune_operator.policies.restart import judge_failure
from tests.support.operator_parts import NOW, make_exit, make_pod, make_report, make_test_plan, make_training_job

TEXT = (pathlib.Path(__file__).parents[3] / "operator" / "docs" / "failures.md").read_text()
ROW = re.compile(r"^\| (?P<names>`[^|]+`) \| (?P<codes>[^|]+) \| [^|]+ \| (?P<default>[^|]+) \|$", re.MULTILINE)
ROWS = [
    (name, int(code), found["default"])
    for found in ROW.finditer(TEXT)
    for name in re.findall(r"`(\w+)`", found["names"])
    for code in re.findall(r"\b\d+\b", found["codes"])[:1]
]
JOB = make_training_job(make_test_plan(), is_failed=True)
NO_CAUSES = {
    *("Completed", "Suspended", "DatasetEmptyAfterFilter", "ModelInvalid", "CheckpointInvalid", "PromotionInvalid"),
    *("EvaluationFailed", "DestinationUnavailable"),
}
"""Reasons that training pods do not fail with, or that other phases give."""


@pytest.mark.parametrize(("name", "code", "default"), ROWS, ids=[f"{name}-{code}" for name, code, _ in ROWS])
def test_each_class_does_by_default_what_its_row_says(name, code, default):
    code = 137 if name == "Killed" else code
    ended = make_exit(code, report=make_report("train", code, name, "rank 0: boom"))
    diagnosis = explain_pod(make_pod(JOB, phase="Failed", exit=ended), NOW)
    verdict = judge_failure(diagnosis, FailurePlan(5, 0, ()), 0)
    assert verdict.gives_up == ("fails at once" in default)
    if not verdict.gives_up:
        assert verdict.is_counted == ("does not count" not in default)
        assert bool(verdict.excluded_node) == ("avoids the node" in default)
    assert diagnosis.is_storage_full == ("waits until it has grown" in default)


def test_every_cause_of_a_failed_training_has_a_row():
    documented = {name for found in ROW.finditer(TEXT) for name in re.findall(r"`(\w+)`", found["names"])}
    assert {str(reason) for reason in Reason} - NO_CAUSES <= documented


def test_the_rules_of_the_document_are_valid():
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert len(FailurePolicy.model_validate(yaml.safe_load(block)["failurePolicy"]).rules) == 10
