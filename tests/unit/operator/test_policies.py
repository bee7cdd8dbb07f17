"""The promises of the spec, one by one."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_contract.gates import GateConfig
from finetune_contract.reports import Phase
from finetune_operator.api.v1alpha1 import FailureRule
from finetune_operator.manifests.run_config import build_run_config
from finetune_operator.observed import Claim, PodCondition
from finetune_operator.plan import FailurePlan
from finetune_operator.policies.blockers import find_claim_blocker, find_job_blocker, find_pod_blocker
from finetune_operator.policies.exclusion import exclude_node, list_current
from finetune_operator.policies.failure import choose_first_failed, explain_failure, explain_pod
from finetune_operator.policies.promotion import find_failed_gate, judge_gates
from finetune_operator.policies.restart import LONGEST_DELAY_SECONDS, delay_seconds, judge_failure
from finetune_operator.policies.storage import find_storage_problem, list_contents, resolve_size
from finetune_operator.sizing import choose_accumulation, needed_bytes, to_number
from tests.support.operator_parts import (
    NOW,
    make_exit,
    make_pod,
    make_record,
    make_report,
    make_test_plan,
    make_training_job,
    seconds,
)

PLAN = make_test_plan()
JOB = make_training_job(PLAN, is_failed=True, ended_at=NOW + seconds(20), failure_message="Job has reached the limit")
LLAMA_7B = {"model_parameters": 6_738_415_616, "model_bytes": 13_476_831_232, "dataset_bytes": 0}


def make_policy(max_restarts=5, *rules) -> FailurePlan:
    return FailurePlan(max_restarts, 0, tuple(FailureRule.model_validate(rule) for rule in rules))


def make_failed(code=1, reason="UserCodeError", message="boom", index=0, *, after=10.0, details=None, **fields):
    report = make_report("train", code, reason, message, rank=0, details=details or {})
    return make_pod(JOB, index, phase="Failed", exit=make_exit(code, report=report, after=after), **fields)


def disrupted(reason):
    return {"DisruptionTarget": PodCondition("True", reason, "because")}


def test_a_weight_diff_is_counted_at_the_size_of_the_model():
    plain, wanted = make_test_plan(), make_test_plan(promotion={"weightDiff": {"enabled": True}})
    more = needed_bytes(list_contents(wanted, LLAMA_7B)) - needed_bytes(list_contents(plain, LLAMA_7B))
    assert more == LLAMA_7B["model_bytes"]
    small = make_test_plan(promotion={"weightDiff": {"enabled": True}}, workspace={"size": "1Gi"})
    assert "its weight diff" in find_storage_problem(small, LLAMA_7B, None)[1]


def test_the_pod_that_failed_first_explains_the_attempt():
    pods = [
        make_failed(index=1, message="connection closed by peer", after=12),
        make_failed(message="the cause", after=11),
    ]
    assert "the cause" in explain_failure(JOB, pods, NOW).failure.message


def test_a_node_that_went_explains_the_ranks_that_failed_of_it():
    pods = [make_failed(after=1), make_failed(137, index=1, after=30, conditions=disrupted("DeletionByTaintManager"))]
    diagnosis = explain_failure(JOB, pods, NOW)
    assert (diagnosis.failure.reason, diagnosis.is_counted) == ("NodeLost", False)


def test_a_pod_that_was_asked_to_stop_explains_nothing_while_another_failed():
    pods = [make_failed(75, "Suspended", after=1), make_failed(1, index=1, message="the cause", after=5)]
    assert choose_first_failed(pods).index == 1


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("PreemptionByScheduler", "Preempted"),
        ("EvictionByEvictionAPI", "Evicted"),
        ("DeletionByPodGC", "NodeLost"),
        ("TerminationByKubelet", "Evicted"),
        ("SomethingNew", "Evicted"),
    ],
)
def test_disruptions_are_named_and_not_counted(reason, expected):
    diagnosis = explain_pod(make_failed(137, conditions=disrupted(reason)), NOW)
    assert (diagnosis.failure.reason, diagnosis.is_counted, diagnosis.is_retried) == (expected, False, True)


@pytest.mark.parametrize(
    ("ended", "fields", "reason", "is_counted"),
    [
        (make_exit(137, "OOMKilled"), {}, "OutOfMemoryKilled", True),
        (make_exit(137, "Error"), {}, "Killed", True),
        (make_exit(137, "Error"), {"deleting_since": NOW}, "Interrupted", False),
        (make_exit(75, "Error"), {}, "Interrupted", False),
        (make_exit(1, "Error", "Traceback: KeyError"), {}, "UserCodeError", True),
        (None, {"deleting_since": NOW}, "PodDeleted", False),
        (None, {"reason": "Evicted", "message": "The node was low on resource: memory"}, "Evicted", False),
    ],
)
def test_pods_without_a_report_are_explained_by_what_kubernetes_says(ended, fields, reason, is_counted):
    diagnosis = explain_pod(make_pod(JOB, phase="Failed", exit=ended, **fields), NOW)
    assert (diagnosis.failure.reason, diagnosis.is_counted) == (reason, is_counted)
    assert diagnosis.failure.message.startswith("pod support-7b-train-1-0 on node node-0")


def test_a_job_whose_pods_are_gone_was_interrupted():
    diagnosis = explain_failure(JOB, [], NOW)
    assert (diagnosis.failure.reason, diagnosis.is_counted) == ("PodDeleted", False)


@pytest.mark.parametrize("code", [64, 65, 66, 70, 77, 78, 79, 84])
def test_exit_codes_that_would_only_repeat_are_final(code):
    verdict = judge_failure(explain_pod(make_failed(code), NOW), make_policy(), 0)
    assert verdict.gives_up
    assert verdict.reason == "UserCodeError"


@pytest.mark.parametrize("code", [1, 69, 73, 80, 81, 82, 83, 85, 137])
def test_other_exit_codes_are_tried_again(code):
    assert not judge_failure(explain_pod(make_failed(code), NOW), make_policy(), 0).gives_up


def test_only_counted_failures_use_up_the_restarts():
    counted, free = (
        explain_pod(make_failed(), NOW),
        explain_pod(make_failed(conditions=disrupted("DeletionByPodGC")), NOW),
    )
    assert judge_failure(counted, make_policy(2), 2).gives_up
    assert not judge_failure(free, make_policy(0), 9).gives_up


@pytest.mark.parametrize(
    ("action", "gives_up", "is_counted", "excluded"),
    [
        ("RestartJob", False, True, ""),
        ("RestartJobIgnoreLimit", False, False, ""),
        ("FailJob", True, False, ""),
        ("ExcludeNode", False, True, "node-0"),
    ],
)
def test_a_rule_that_applies_decides(action, gives_up, is_counted, excluded):
    rule = {"name": "mine", "onExitCodes": {"values": [79]}, "action": action}
    verdict = judge_failure(explain_pod(make_failed(79), NOW), make_policy(5, rule), 0)
    assert (verdict.gives_up, verdict.is_counted, verdict.excluded_node) == (gives_up, is_counted, excluded)


@pytest.mark.parametrize(
    ("rule", "applies"),
    [
        ({"onExitCodes": {"operator": "NotIn", "values": [2]}}, True),
        ({"onExitCodes": {"values": [2]}}, False),
        ({"onLogPattern": "Xid .* 79"}, True),
        ({"onLogPattern": "Xid .* 13"}, False),
        ({"onLogPattern": "^RuntimeError: .*ECC"}, True),
        ({"onLogPattern": "boom.*Runtime"}, False),
        ({"onLogPattern": "step 4$"}, True),
        ({"onPodConditions": [{"type": "DisruptionTarget"}]}, True),
        ({"onPodConditions": [{"type": "DisruptionTarget", "status": "False"}]}, False),
    ],
)
def test_rules_match_codes_conditions_and_log_lines(rule, applies):
    lines = "step 4\nRuntimeError: ECC"
    failed = make_failed(
        message="NVRM: Xid (PCI:0000:c1) 79", conditions=disrupted("DeletionByPodGC"), details={"last_lines": lines}
    )
    verdict = judge_failure(explain_pod(failed, NOW), make_policy(5, {"name": "r", "action": "FailJob", **rule}), 0)
    assert verdict.gives_up == applies


@given(st.integers(min_value=0, max_value=10_000))
def test_the_backoff_starts_at_nothing_never_shrinks_and_is_bounded(failures):
    assert delay_seconds(0) == 0
    assert delay_seconds(failures) <= delay_seconds(failures + 1) <= LONGEST_DELAY_SECONDS


def make_gate(task, metric, **bound):
    return GateConfig(task, metric, *next(iter(bound.items())))


SCORES = {"scores": {"arc": {"acc_norm,none": 0.5}, "holdout": {"loss": 2.0}}, "baseline": {"holdout": {"loss": 1.5}}}


@pytest.mark.parametrize(
    ("gate", "reason"),
    [
        ({"task": "arc", "metric": "acc_norm", "min": 0.5}, None),
        ({"task": "arc", "metric": "acc_norm", "min": 0.51}, "EvaluationBelowGate"),
        ({"task": "holdout", "metric": "loss", "maxRegression": 0.5}, None),
        ({"task": "holdout", "metric": "loss", "maxRegression": 0.4}, "EvaluationBelowGate"),
        ({"task": "arc", "metric": "acc_norm", "maxRegression": 1}, "ScoreMissing"),
        ({"task": "mmlu", "metric": "acc", "min": 0.1}, "ScoreMissing"),
    ],
)
def test_gates_compare_with_a_number_or_with_the_base_model(gate, reason):
    failed = find_failed_gate((make_gate(**gate),), SCORES)
    assert (failed[0] if failed else None) == reason


def test_a_missing_score_names_those_that_there_are():
    (_, message) = find_failed_gate((make_gate("mmlu", "acc", min=0.1),), SCORES)
    assert "arc.acc_norm,none, holdout.loss" in message


def test_seven_billion_parameters_need_what_was_measured():
    plan = make_test_plan(training={"recipe": "wizardlm-freeform"}, resources={"gpusPerNode": 4})
    assert needed_bytes(list_contents(plan, LLAMA_7B)) == 4 * 14 * 6_738_415_616 + 2 * 13_476_831_232
    assert (
        find_storage_problem(
            dataclasses.replace(plan, workspace=make_test_plan(workspace={"size": "1Ti"}).workspace), LLAMA_7B, None
        )
        is None
    )


def test_lower_zero_stages_write_the_weights_twice():
    three, two = (
        needed_bytes(list_contents(make_test_plan(training={"deepspeed": {"zeroStage": stage}}), LLAMA_7B))
        for stage in (3, 2)
    )
    assert two - three == 4 * 2 * 6_738_415_616


def test_adapters_need_a_fraction():
    plan = make_test_plan(training={"method": "lora"})
    assert needed_bytes(list_contents(plan, LLAMA_7B)) < 32e9


@pytest.mark.parametrize(
    ("billions", "lora", "stage"),
    [(7, {}, 2), (70, {}, 3), (70, {"quantization": "nf4"}, 2), (120, {"quantization": "nf4"}, 3)],
)
def test_a_base_in_four_bits_stays_whole_on_each_gpu_up_to_three_times_the_size(billions, lora, stage):
    plan = make_test_plan(training={"method": "lora", "lora": lora}, resources={"gpusPerNode": 8})
    record = make_record(Phase.INSPECT).with_phase(Phase.INSPECT, {"model_parameters": billions * 10**9})
    run = build_run_config(plan, record, 1)
    assert (run.training.zero_stage, run.training.lora_quantization) == (stage, lora.get("quantization", ""))
    # Checkpoints and the promoted model are those of an adapter on a base in 16 bits.
    contents = list_contents(plan, record.details(Phase.INSPECT))
    assert contents.lora_rank == 16
    assert needed_bytes(contents) > 2 * billions * 10**9


def test_a_size_that_is_too_small_is_refused_with_what_to_ask_for():
    plan = make_test_plan(workspace={"size": "100Gi"})
    reason, message = find_storage_problem(plan, LLAMA_7B, None)
    assert reason == "WorkspaceTooSmall"
    wanted = resolve_size(make_test_plan(), LLAMA_7B)
    assert f"ask for {wanted}" in message
    assert find_storage_problem(make_test_plan(workspace={"size": wanted}), LLAMA_7B, None) is None


def test_a_claim_for_one_node_is_refused_for_two():
    plan = make_test_plan(workspace={"existingClaim": "shared"}, resources={"nodes": 2})
    claim = Claim("shared", phase="Bound", capacity_bytes=2**50, access_modes=("ReadWriteOnce",))
    reason, message = find_storage_problem(plan, LLAMA_7B, claim)
    assert reason == "AccessModeUnsuitable"
    assert "ReadWriteMany" in message


@given(
    per_device=st.integers(1, 64),
    max_length=st.integers(16, 8192),
    tokens=st.integers(0, 10**9),
    rows=st.integers(0, 10**6),
    wanted=st.integers(1, 64),
)
def test_packing_never_asks_for_more_passes_than_padding(per_device, max_length, tokens, rows, wanted):
    assert 1 <= choose_accumulation(per_device, max_length, tokens, rows, wanted) <= wanted


@pytest.mark.parametrize(("text", "number"), [("1Gi", 2**30), ("500m", 0.5), ("1.5T", 1.5e12), (4, 4), ("2k", 2000)])
def test_quantities_are_read_as_kubernetes_does(text, number):
    assert to_number(text) == number


@pytest.mark.parametrize("text", ["", "Gi", "1 Gi", "1gib", "-1"])
def test_what_is_no_quantity_is_refused(text):
    with pytest.raises(ValueError, match="not a quantity"):
        to_number(text)


def pending(**fields):
    return make_pod(JOB, phase="Pending", **{"started_at": None, **fields})


def test_an_image_and_a_secret_and_a_config_are_named():
    for waiting, message, reason in (
        ("ErrImagePull", "no such host", "ImagePullFailed"),
        ("InvalidImageName", "bad", "ImagePullFailed"),
        ("CreateContainerConfigError", 'secret "hub" not found', "SecretNotFound"),
        ("CreateContainerConfigError", 'configmap "x" not found', "ContainerConfigInvalid"),
        ("CreateContainerConfigError", "couldn't find key", "ContainerConfigInvalid"),
        ("RunContainerError", "exec failed", "ContainerConfigInvalid"),
    ):
        blocker = find_pod_blocker(PLAN, [pending(waiting_reason=waiting, waiting_message=message)], {}, NOW)
        assert (blocker.reason, blocker.is_stalled) == (reason, True)


def test_a_pod_that_only_starts_is_not_in_anyones_way():
    assert find_pod_blocker(PLAN, [pending(waiting_reason="ContainerCreating")], {}, NOW + seconds(600)) is None


@pytest.mark.parametrize(("waited", "found", "is_stalled"), [(44, False, False), (45, True, False), (450, True, True)])
def test_a_pod_that_fits_nowhere_is_said_within_a_minute_and_calls_for_help_after_ten_times_that(
    waited, found, is_stalled
):
    pod = pending(node="", conditions={"PodScheduled": PodCondition("False", "Unschedulable", "0/1 nodes", NOW)})
    blocker = find_pod_blocker(PLAN, [pod], {}, NOW + seconds(waited))
    assert (blocker is not None) == found
    if blocker is not None:
        assert (blocker.is_scheduling, blocker.is_stalled) == (True, is_stalled)


def test_a_volume_that_cannot_be_mounted_is_quoted_after_a_minute():
    pod = pending(waiting_reason="ContainerCreating")
    warnings = {pod.uid: "FailedMount: timed out"}
    assert find_pod_blocker(PLAN, [pod], warnings, NOW + seconds(30)) is None
    assert find_pod_blocker(PLAN, [pod], warnings, NOW + seconds(61)).reason == "VolumeNotMounted"


def test_a_job_that_may_make_no_pods_is_quoted():
    assert find_job_blocker("", "x") is None
    assert find_job_blocker("exceeded quota: gpus", "x").message == "Job x cannot make pods: exceeded quota: gpus"


def test_a_claim_is_blocked_by_its_class_or_its_warning_and_not_by_waiting_for_a_pod():
    claim = Claim("c", storage_class="fast")
    assert find_claim_blocker(PLAN, claim, False, "") is None
    assert find_claim_blocker(PLAN, claim, True, "").reason == "StorageClassNotFound"
    assert find_claim_blocker(PLAN, claim, False, "no disks left").message.endswith("no disks left")
    assert find_claim_blocker(PLAN, dataclasses.replace(claim, phase="Bound"), True, "old warning") is None
    assert find_claim_blocker(PLAN, dataclasses.replace(claim, phase="Lost"), False, "").reason == "ClaimLost"


def test_every_phase_has_a_place_in_the_failure_conditions():
    from finetune_operator.status import _PHASE_CONDITIONS

    assert set(_PHASE_CONDITIONS) == set(Phase)


def test_the_pod_that_raised_explains_those_that_lost_it_within_the_same_second():
    pods = [
        make_failed(85, "RankFailed", "lost its peers", index=0, after=10),
        make_failed(1, "UserCodeError", "the cause", index=1, after=10),
    ]
    assert choose_first_failed(pods).index == 1


def test_of_two_errors_of_their_own_the_earlier_to_the_millisecond_is_the_cause():
    pods = [
        make_failed(index=0, after=10, details={"failed_at": 1000.251}),
        make_failed(index=1, after=10, details={"failed_at": 1000.250}),
    ]
    assert choose_first_failed(pods).index == 1


def test_pods_that_lost_one_which_is_gone_are_not_to_blame():
    lost = make_failed(85, "RankFailed", "lost its peers")
    diagnosis = explain_failure(JOB, [lost], NOW, num_pods=2)
    assert (diagnosis.failure.reason, diagnosis.is_counted) == ("PodDeleted", False)
    assert explain_failure(JOB, [lost], NOW, num_pods=1).failure.reason == "RankFailed"


def test_the_rank_that_holds_up_the_others_is_found_over_all_pods():
    def hung(index, rank, at, waits):
        stacks = {str(rank): {"at": at, "waits": waits}}
        return make_failed(83, "NoProgress", "no step", index=index, details={"stacks": stacks})

    pods = [
        hung(0, 0, "distributed.py:79", True),
        hung(1, 1, "data.py:7", False),
        hung(2, 2, "distributed.py:79", True),
    ]
    failure = explain_failure(JOB, pods, NOW, num_pods=3).failure
    assert (failure.pod, failure.node) == ("support-7b-train-1-1", "node-1")
    assert failure.message.endswith(
        "over all pods: rank 1 stands at data.py:7; ranks 0, 2 wait for the others at distributed.py:79"
    )


def test_a_message_names_pod_node_code_rank_and_the_last_lines():
    details = {"last_lines": "one\ntwo\nthree\nfour\nboom"}
    message = explain_pod(make_failed(message="boom", details=details), NOW).failure.message
    assert message == (
        "pod support-7b-train-1-0 on node node-0 (exit code 1): rank 0: boom; last lines: two | three | four"
    )


def test_a_pod_out_of_memory_fails_at_once_with_the_memory_to_ask_for():
    pod = make_pod(JOB, phase="Failed", exit=make_exit(137, "OOMKilled"))
    diagnosis = explain_failure(JOB, [pod], NOW, memory="64Gi")
    assert diagnosis.failure.hint == "raise resources.memory, which is 64Gi, to 96Gi"
    assert judge_failure(diagnosis, make_policy(), 0).reason == "OutOfMemoryKilled"


def test_a_broken_device_is_restarted_elsewhere_and_counts():
    verdict = judge_failure(explain_pod(make_failed(81, "XidError"), NOW), make_policy(), 0)
    assert (verdict.gives_up, verdict.is_counted, verdict.excluded_node) == (False, True, "node-0")
    rule = {"name": "stay", "onExitCodes": {"values": [81]}, "action": "RestartJob"}
    assert judge_failure(explain_pod(make_failed(81, "XidError"), NOW), make_policy(5, rule), 0).excluded_node == ""


def test_restarts_elsewhere_are_used_up_as_others_are():
    rule = {"name": "mine", "onExitCodes": {"values": [1]}, "action": "ExcludeNode"}
    assert judge_failure(explain_pod(make_failed(), NOW), make_policy(2, rule), 2).reason == "RestartsExhausted"


def test_a_job_avoids_a_few_nodes_each_for_a_day():
    exclusions = ()
    for number in range(6):
        exclusions = exclude_node(exclusions, f"node-{number}", "XidError", NOW + seconds(number))
    assert [each.node for each in exclusions] == ["node-2", "node-3", "node-4", "node-5"]
    assert list_current(exclusions, NOW + seconds(24 * 3600 + 3)) == exclusions[2:]
    again = exclude_node(exclusions, "node-3", "mine", NOW + seconds(60))
    assert [each.node for each in again] == ["node-2", "node-4", "node-5", "node-3"]


def test_a_gate_may_name_the_most_that_a_score_is_to_be():
    scores = {"scores": {"refusals": {"refusal_rate": 0.1}}, "baseline": {"refusals": {"refusal_rate": 0.02}}}

    def find_problem(**bound):
        failed = find_failed_gate((make_gate("refusals", "refusal_rate", **bound),), scores)
        return failed[1] if failed else ""

    assert find_problem(max=0.1) == ""
    assert "above the gate's max 0.05" in find_problem(max=0.05)
    # More refusals are worse.
    assert find_problem(maxRegression=0.1) == ""
    assert "worse by 0.08" in find_problem(maxRegression=0.05)


def test_a_score_that_is_no_number_passes_no_gate():
    details = {"scores": {"arc": {"acc": float("nan")}}, "baseline": {"arc": {"acc": 0.5}}}
    bounds = ({"min": -1}, {"max": 1}, {"maxRegression": 1})
    gates = [make_gate("arc", "acc", **bound) for bound in bounds]
    assert [each.verdict for each in judge_gates(gates, details)] == ["Failed"] * 3


def test_every_gate_is_judged_with_its_numbers():
    gates = [
        make_gate("holdout", "loss", maxRegression=0.5),
        make_gate("arc", "acc_norm", min=0.6),
        make_gate("mmlu", "acc", min=0.1),
    ]
    assert [(each.score, each.baseline, each.verdict) for each in judge_gates(gates, SCORES)] == [
        (2.0, 1.5, "Passed"),
        (0.5, None, "Failed"),
        (None, None, "ScoreMissing"),
    ]


def test_models_that_are_downloaded_to_be_scored_or_to_judge_need_room():
    plan = make_test_plan(training={"recipe": "wizardlm-freeform"}, resources={"gpusPerNode": 4})
    alone = needed_bytes(list_contents(plan, LLAMA_7B))
    assert needed_bytes(list_contents(plan, {**LLAMA_7B, "evaluated_bytes": 5 * 10**9})) == alone + 5 * 10**9
    assert needed_bytes(list_contents(plan, {**LLAMA_7B, "judge_bytes": 3 * 10**9})) == alone + 3 * 10**9
