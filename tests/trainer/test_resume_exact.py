"""A resumed run ends bit-identical to one that was not interrupted, in bf16: all recipes, stages and layouts of rows.

The first run is ended in the middle of an epoch, of which the rows of its last, smaller steps are still to come.
"""

import pytest
import transformers.trainer

from finetune_contract.reports import ExitCode
from finetune_trainer.checkpoints.layout import list_quarantined
from finetune_trainer.training.sampler import ReadPlan, RowLoader
from tests.support.training_runs import end_state

RECIPES = {"efficient": "alpaca", "wizardlm-freeform": "wizardlm"}
STEPS = ("training.scheduler=constant", "training.warmup_steps=0", "checkpoint.every_steps=0")
EPOCH_END = ("training.per_device_batch_size=3", "training.gradient_accumulation_steps=2")
"""12 rows per step: 40 rows, and about 13 packs, leave a remainder of less than one pass of all ranks."""


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_run_ends_bit_identical(make_run, recipe, packing, stage):
    settings = (
        *(*STEPS, *EPOCH_END, f"training.recipe={recipe}", f"dataset.prompt_template={RECIPES[recipe]}"),
        *(f"training.packing={packing}", f"training.zero_stage={stage}", "training.precision=bf16"),
    )
    whole, resumed = make_run("llama", "whole", *settings), make_run("llama", "resumed", *settings)
    whole.train("training.max_steps=7")
    resumed.train("training.max_steps=3")
    results = resumed.train("training.max_steps=7")

    assert (results["resumed_from_step"], results["step"]) == (3, 7)
    assert end_state(resumed.manifests()[7]) == end_state(whole.manifests()[7])
    assert len(end_state(whole.manifests()[7])) > 5


def test_a_shard_whose_content_is_damaged_costs_the_steps_since_the_checkpoint_before(make_run):
    run = make_run("llama", "workspace", "checkpoint.every_steps=2", "checkpoint.keep_latest=9", *STEPS[:2])
    run.train("training.max_steps=6")
    before = end_state(run.manifests()[6])
    checkpoints = run.workspace.checkpoints
    flip_bytes(next((checkpoints / "checkpoint-6").rglob("*rank_1*optim_states.pt")))
    flip_bytes(checkpoints / "checkpoint-4" / "scheduler.pt")

    # Not a step is trained: nothing newer is committed, which would empty the quarantine.
    assert run.call("train", "training.max_steps=2") == ExitCode.OK
    assert run.report("train")["details"]["resumed_from_step"] == 2
    assert [folder.step for folder in list_quarantined(checkpoints)] == [4, 6]

    results = run.train("training.max_steps=6")
    assert results["resumed_from_step"] == 2
    assert end_state(run.manifests()[6]) == before


def test_the_trainer_goes_on_in_an_epoch_without_reading_what_is_before(stack):
    class Rows:
        num_reads = 0

        def __len__(self):
            return 10**12

        def __getitem__(self, number):
            self.num_reads += 1
            return {"input_ids": [number], "labels": [number], "seq_lengths": [1]}

    rows = Rows()
    loader = RowLoader(rows, lambda batch: batch, ReadPlan(len(rows), 4, 2, rank=0, seed=1))
    resumed = transformers.trainer.skip_first_batches(loader, 4 * 10**5)
    assert len(next(iter(resumed))) == 4
    assert rows.num_reads == 4


def flip_bytes(path):
    """Damage a file without changing its size."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 16] = bytes(255 - byte for byte in content[middle : middle + 16])
    path.write_bytes(content)
