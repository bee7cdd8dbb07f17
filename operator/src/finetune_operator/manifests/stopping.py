"""How long training pods may take to stop, and how often their ranks may start again inside them.

Used by `training` and `run_config`. Pure.
"""

from __future__ import annotations

import math

from finetune_contract.reports import Phase
from finetune_operator.placement import PRESETS
from finetune_operator.plan import Plan
from finetune_operator.record import Record
from finetune_operator.sizing import Contents, checkpoint_bytes, choose_zero_stage, find_lora_rank

SHORTEST_GRACE_SECONDS = 120
LONGEST_GRACE_SECONDS = 3600
"""A pod that hangs holds its GPUs for as long."""
SLOW_BYTES_PER_SECOND = 100e6
"""What a busy network file system takes, until a save has been measured."""
ASSUMED_STEP_SECONDS = 30.0
"""Until a step has been measured."""
MAX_IN_POD_RESTARTS = 3


def expect_save_seconds(plan: Plan, record: Record) -> float:
    """Return how long a save takes: the longest measured, before that an estimate from the checkpoint's size."""
    if record.save_seconds:
        return record.save_seconds
    parameters = int(record.details(Phase.INSPECT).get("model_parameters") or 0)
    training = plan.run.training
    stage = choose_zero_stage(training, parameters, plan.processes)
    contents = Contents(0, 0, parameters, checkpoints_kept=1, zero_stage=stage, lora_rank=find_lora_rank(training))
    return checkpoint_bytes(contents) / SLOW_BYTES_PER_SECOND


def choose_grace_seconds(plan: Plan, record: Record) -> int:
    """Return the time from SIGTERM to SIGKILL: the step under way, a save that is being written, and one more save."""
    step = record.step_seconds or ASSUMED_STEP_SECONDS
    wanted = math.ceil(2 * step + 2 * expect_save_seconds(plan, record))
    return max(SHORTEST_GRACE_SECONDS, min(LONGEST_GRACE_SECONDS, wanted))


def choose_notice_seconds(plan: Plan, grace_seconds: int) -> int:
    """Return the time that a pod may count on after SIGTERM: its own, or less where the cloud takes nodes away."""
    preset = PRESETS.get(plan.placement.preset)
    return min(grace_seconds, preset.notice_seconds) if preset and preset.notice_seconds else grace_seconds


def count_allowed_in_pod_restarts(plan: Plan, record: Record) -> int:
    """Return how often crashed ranks may start again inside their pod.

    Never more often than the job may restart at all, not across nodes, and not where a rule of the job decides by exit
    code or log: the operator reads those only when the pod has ended.
    """
    rules = plan.failure.rules
    if plan.run.topology.nodes > 1 or any(rule.on_exit_codes or rule.on_log_pattern for rule in rules):
        return 0
    return max(0, min(MAX_IN_POD_RESTARTS, plan.failure.max_restarts - record.restarts_counted))
