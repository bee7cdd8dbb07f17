"""The checkpoint doctor on folders that the stock Trainer with DeepSpeed really wrote, and our training after it."""

import json
import shutil

import pytest

from finetune_contract.reports import ExitCode
from finetune_trainer.__main__ import main
from finetune_trainer.checkpoints.layout import list_folders
from finetune_trainer.commands.checkpoints import State
from tests.bench import stock_trainer
from tests.support.model_bytes import build_safetensors
from tests.support.training_runs import SMALL, Run

SETTINGS = ("training.max_steps=6", "checkpoint.every_steps=2", "checkpoint.keep_latest=9", "training.packing=false")


@pytest.fixture(scope="module", params=[3, 2], ids=["zero3", "zero2"])
def stock(request, tmp_path_factory, models, data):
    """A folder with the checkpoints 2, 4 and 6 of the stock Trainer on two ranks, and its settings."""
    settings = (*SMALL, *SETTINGS, f"training.zero_stage={request.param}")
    run = Run(tmp_path_factory.mktemp("stock"), models["llama"], data, settings)
    assert stock_trainer.train(run.words("train")) == 0
    return run


@pytest.fixture
def copied(stock, tmp_path):
    """A copy of that folder, to be damaged."""
    run = Run(tmp_path / "workspace", stock.model, stock.data, stock.settings)
    shutil.copytree(stock.workspace.checkpoints, run.workspace.checkpoints)
    return run


def _ask(capsys, *words):
    code = main(["checkpoints", *map(str, words)])
    return code, json.loads(capsys.readouterr().out)


def _optimizer(folder, rank=0):
    return next(folder.glob(f"global_step*/*pp_rank_{rank}_*optim_states.pt"))


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "latest-missing": lambda folder: (folder / "latest").unlink(),
    "latest-dangling": lambda folder: (folder / "latest").write_text("global_step5"),
    "trainer-state-missing": lambda folder: (folder / "trainer_state.json").unlink(),
    "file-damaged": lambda folder: _cut(_optimizer(folder)),
    "file-empty": lambda folder: _optimizer(folder).write_bytes(b""),
    "shards-missing": lambda folder: _optimizer(folder, 1).unlink(),
    "weights-empty": lambda folder: (folder / "model.safetensors").write_bytes(build_safetensors({"w": (0,)})),
    "step-mismatch": lambda folder: (folder.parent / "checkpoint-4").rename(folder.parent / "checkpoint-5"),
    "save-unfinished": lambda folder: (folder / "checkpoint-is-incomplete.txt").touch(),
}


def test_what_the_stock_trainer_writes_is_whole_to_the_last_byte(stock, capsys):
    code, answer = _ask(capsys, "verify", "--json", stock.root)

    assert code == ExitCode.OK
    assert answer["status"] == "ok"
    stage = 3 if "training.zero_stage=3" in stock.settings else 2
    found = [(one["step"], one["complete"], one["worldSize"], one["zeroStage"]) for one in answer["checkpoints"]]
    assert found == [(step, True, 2, stage) for step in (2, 4, 6)]
    assert answer["resumeFrom"] == str(stock.workspace.checkpoints / "checkpoint-6")
    assert answer["resumeCommand"] == f"--resume_from_checkpoint {answer['resumeFrom']}"


@pytest.mark.parametrize("fault", DAMAGES)
def test_each_damage_to_a_real_checkpoint_is_named(copied, capsys, fault):
    DAMAGES[fault](copied.workspace.checkpoints / "checkpoint-6")

    _, answer = _ask(capsys, "ls", "--json", copied.root)

    faults = {fault for one in answer["checkpoints"] for fault in one["faults"]}
    assert fault in faults
    expected = 6 if fault == "step-mismatch" else 4
    assert answer["resumeFrom"] == str(copied.workspace.checkpoints / f"checkpoint-{expected}")


def test_a_flipped_bit_in_any_shard_is_found_by_reading_every_byte(copied, capsys):
    for path in (copied.workspace.checkpoints / "checkpoint-6").glob("global_step6/*optim_states.pt"):
        _flip(path)
        assert _ask(capsys, "ls", "--json", copied.root)[1]["resumeFrom"].endswith("checkpoint-6")
        _, answer = _ask(capsys, "verify", "--json", copied.root)
        assert answer["checkpoints"][-1]["faults"] == ["file-damaged"]
        assert path.name in answer["checkpoints"][-1]["problems"][0]
        _flip(path)
    assert _ask(capsys, "verify", "--json", copied.root)[1]["status"] == "ok"


def test_after_a_repair_our_trainer_goes_on_where_the_stock_trainer_stopped(copied, capsys):
    checkpoints = copied.workspace.checkpoints
    (checkpoints / "checkpoint-6/latest").unlink()
    _cut(_optimizer(checkpoints / "checkpoint-4"))

    code, _ = _ask(capsys, "repair", "--yes", "--now", "--json", copied.root)
    assert code == State.OK
    assert [folder.step for folder in list_folders(checkpoints)] == [2, 6]

    results = copied.train("training.max_steps=8")

    assert (results["resumed_from_step"], results["step"]) == (6, 8)


def test_an_adopted_checkpoint_can_be_promoted_as_it_is(copied, capsys):
    _ask(capsys, "repair", "--yes", "--now", "--json", copied.root)

    assert copied.call("promote") == 0, copied.report("promote")
    assert copied.report("promote")["details"]["checkpoint_step"] == 6
