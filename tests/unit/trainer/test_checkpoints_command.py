"""The fixed face of `finetune-trainer checkpoints`."""

import json
import os
import shutil

import pytest

from finetune_contract.reports import ExitCode
from finetune_trainer.__main__ import main
from finetune_trainer.checkpoints.doctor import confirm_newest, examine_folder
from finetune_trainer.checkpoints.layout import DELETING, MANIFEST, list_folders, list_quarantined
from finetune_trainer.checkpoints.prune import build_fence, delete_planned, plan_prune
from finetune_trainer.checkpoints.resume import choose_resume, observe_checkpoints
from finetune_trainer.checkpoints.retention import Limits
from finetune_trainer.commands.checkpoints import State
from finetune_trainer.errors import TrainerError
from tests.support.checkpoints import write_checkpoint
from tests.support.foreign import write_foreign, write_torch_file
from tests.support.model_bytes import build_safetensors


def _ask(capsys, *arguments):
    code = main(["checkpoints", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_ls_prints_one_object_with_the_checkpoint_to_resume_from(tmp_path, capsys):
    write_checkpoint(tmp_path, 100)
    (write_checkpoint(tmp_path, 200) / MANIFEST).unlink()

    code, output = _ask(capsys, "ls", "--json", tmp_path)

    answer = json.loads(output)
    assert code == ExitCode.OK
    assert answer["resumeFrom"] == str(tmp_path / "checkpoint-100")
    assert [(one["step"], one["complete"]) for one in answer["checkpoints"]] == [(100, True), (200, False)]
    assert answer["checkpoints"][1]["problems"] == [f"no {MANIFEST}: the save did not finish"]
    assert answer["checkpoints"][0]["path"] == str(tmp_path / "checkpoint-100")


def test_verify_reads_every_byte_and_then_resumes_from_another(tmp_path, capsys):
    write_checkpoint(tmp_path, 100)
    shard = write_checkpoint(tmp_path, 200) / "global_step200/shard_0.pt"
    shard.write_bytes(b"SHARD  0")

    assert json.loads(_ask(capsys, "ls", "--json", tmp_path)[1])["resumeFrom"].endswith("checkpoint-200")
    assert json.loads(_ask(capsys, "verify", "--json", tmp_path)[1])["resumeFrom"].endswith("checkpoint-100")


def test_plan_says_what_retention_would_delete(tmp_path, capsys):
    for step, metric in ((100, 0.5), (200, 0.9), (300, 0.8), (400, 0.7)):
        write_checkpoint(tmp_path, step, metric=metric)

    answer = json.loads(_ask(capsys, "plan", "--json", tmp_path, "--keep-latest", 2, "--keep-best", 1)[1])

    assert answer["wouldDelete"] == [200]
    assert answer["nextSaveBytes"] > 0


def test_a_workspace_stands_for_its_checkpoints(tmp_path, capsys):
    write_checkpoint(tmp_path / "checkpoints", 100)

    code, output = _ask(capsys, "ls", tmp_path)

    assert code == ExitCode.OK
    assert "Resume from " + str(tmp_path / "checkpoints/checkpoint-100") in output


def test_a_missing_folder_is_an_error_that_names_it(tmp_path, capsys):
    assert main(["checkpoints", "ls", str(tmp_path / "absent")]) == ExitCode.NO_INPUT
    assert str(tmp_path / "absent") in capsys.readouterr().err


def test_an_empty_folder_means_training_begins_anew(tmp_path, capsys):
    code, output = _ask(capsys, "ls", "--json", tmp_path)

    answer = json.loads(output)
    assert code == ExitCode.OK
    assert (answer["checkpoints"], answer["resumeFrom"], answer["status"]) == ([], None, "none")


def test_an_empty_folder_is_said_in_words_with_where_there_are_some(tmp_path, capsys):
    write_checkpoint(tmp_path / "run-7", 100)

    code, output = _ask(capsys, "ls", tmp_path)

    assert code == State.NOTHING
    assert f"{tmp_path} holds no folder named checkpoint-N." in output
    assert f"There are some in {tmp_path / 'run-7'}." in output


def test_a_file_is_an_error_that_names_it(tmp_path, capsys):
    (tmp_path / "file").write_text("x")

    assert main(["checkpoints", "ls", str(tmp_path / "file")]) == ExitCode.NO_INPUT
    assert f"{tmp_path / 'file'}: is a file, not a folder" in capsys.readouterr().err


@pytest.fixture
def damaged(tmp_path):
    """A run of the stock Trainer: 100 and 200 are whole, five newer ones are damaged, each in its way."""
    for step in range(100, 800, 100):
        write_foreign(tmp_path, step)
    (tmp_path / "checkpoint-300/latest").unlink()
    (tmp_path / "checkpoint-400/trainer_state.json").unlink()
    shard = tmp_path / "checkpoint-500/global_step500/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shard.write_bytes(shard.read_bytes()[:300])
    (tmp_path / "checkpoint-600/global_step600/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    weights = build_safetensors({"embed.weight": (0,)})
    (tmp_path / "checkpoint-700/model.safetensors").write_bytes(weights)
    return tmp_path


def _steps(root):
    return [folder.step for folder in list_folders(root)]


def _snapshot(root):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}


@pytest.mark.parametrize("action", ["ls", "verify", "plan", "prune", "repair"])
def test_a_folder_of_the_stock_trainer_is_read_and_left_as_it_is(damaged, capsys, action):
    before = _snapshot(damaged)
    options = ["--keep-latest", "1", "--parameters", "1000"][: 4 if action == "plan" else 0]

    code, output = _ask(capsys, action, "--json", damaged, *options)

    answer = json.loads(output)
    assert code == (ExitCode.OK if action in ("ls", "verify", "plan") else State.DAMAGED)
    assert answer["status"] == "damaged"
    assert answer["resumeFrom"] == str(damaged / "checkpoint-200")
    assert answer["resumeCommand"] == f"--resume_from_checkpoint {damaged / 'checkpoint-200'}"
    assert answer["passedOver"] == [str(damaged / f"checkpoint-{step}") for step in (700, 600, 500, 400, 300)]
    assert [one["faults"] for one in answer["checkpoints"] if not one["complete"]] == [
        ["latest-missing"],
        ["trainer-state-missing"],
        ["file-damaged"],
        ["shards-missing"],
        ["weights-empty"],
    ]
    assert _snapshot(damaged) == before


def test_people_read_which_to_resume_from_why_and_what_to_type(damaged, capsys):
    code, output = _ask(capsys, "ls", damaged)

    assert code == State.DAMAGED
    assert f"Resume from {damaged / 'checkpoint-200'}" in output
    assert (
        "Not         checkpoint-700, checkpoint-600, checkpoint-500, checkpoint-400 and 1 more: what is wrong" in output
    )
    assert f"Type        --resume_from_checkpoint {damaged / 'checkpoint-200'}" in output
    assert "latest is missing: DeepSpeed does not know which folder to load (there: global_step300)" in output


def test_exit_codes_tell_scripts_how_a_folder_stands(tmp_path, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_foreign(whole, 100)
    (write_foreign(broken, 100) / "trainer_state.json").unlink()

    assert _ask(capsys, "ls", whole)[0] == State.OK
    assert _ask(capsys, "ls", broken)[0] == State.NOTHING
    write_foreign(broken, 50)
    assert _ask(capsys, "verify", broken)[0] == State.DAMAGED
    with pytest.raises(SystemExit) as caught:
        main(["checkpoints", "look", str(whole)])
    assert caught.value.code == ExitCode.USAGE


def test_one_checkpoint_can_be_looked_at_alone_whatever_its_name(damaged, tmp_path, capsys):
    answer = json.loads(_ask(capsys, "verify", "--json", damaged / "checkpoint-500")[1])
    assert [one["step"] for one in answer["checkpoints"]] == [500]
    assert answer["resumeFrom"] is None

    named = write_foreign(tmp_path / "other", 70, name="final")
    answer = json.loads(_ask(capsys, "verify", "--json", named)[1])
    assert (answer["checkpoints"][0]["step"], answer["resumeFrom"]) == (70, str(named))


def test_where_our_trainer_has_worked_a_folder_without_manifest_is_an_unfinished_save(tmp_path, capsys):
    write_foreign(tmp_path, 100)
    (tmp_path / "attempt.json").write_text('{"attempt": 1}')

    answer = json.loads(_ask(capsys, "ls", "--json", tmp_path)[1])

    assert answer["checkpoints"][0]["faults"] == ["save-unfinished"]
    assert answer["resumeFrom"] is None


def test_repair_mends_what_it_can_sets_the_rest_aside_and_loses_nothing(damaged, capsys):
    weights = (damaged / "checkpoint-700/model.safetensors").read_bytes()

    code, output = _ask(capsys, "repair", "--yes", "--now", "--json", damaged)

    answer = json.loads(output)
    assert code == State.OK
    assert answer["refused"] == []
    assert _steps(damaged) == [100, 200, 300, 700]
    assert all(one["complete"] and one["hasManifest"] for one in answer["checkpoints"])
    assert (damaged / "checkpoint-300/latest").read_text() == "global_step300"
    assert [folder.path.name for folder in list_quarantined(damaged)] == [
        "checkpoint-400.0",
        "checkpoint-500.0",
        "checkpoint-600.0",
        "checkpoint-700.0",
    ]
    assert (damaged / "quarantine/checkpoint-700.0/model.safetensors").read_bytes() == weights
    # What our trainer does at its start.
    assert choose_resume(observe_checkpoints(damaged, full=True)).step == 700
    assert json.loads(_ask(capsys, "repair", "--json", damaged)[1])["repairs"] == []


def test_repair_renames_a_folder_whose_content_is_of_another_step(tmp_path, capsys):
    write_foreign(tmp_path, 100).rename(tmp_path / "checkpoint-900")
    write_checkpoint(tmp_path / "ours", 100).rename(tmp_path / "ours/checkpoint-900")

    assert _ask(capsys, "repair", "--yes", "--now", tmp_path)[0] == State.OK
    assert _ask(capsys, "repair", "--yes", "--now", tmp_path / "ours")[0] == State.OK
    assert _steps(tmp_path) == _steps(tmp_path / "ours") == [100]


def test_repair_never_renames_onto_another_checkpoint(tmp_path, capsys):
    content = write_foreign(tmp_path, 100)
    shutil.copytree(content, tmp_path / "checkpoint-900")

    _ask(capsys, "repair", "--yes", "--now", tmp_path)

    assert _steps(tmp_path) == [100]
    assert [folder.path.name for folder in list_quarantined(tmp_path)] == ["checkpoint-900.0"]


def test_repair_leaves_a_newest_checkpoint_alone_that_may_still_be_written(damaged, capsys):
    shutil.rmtree(damaged / "checkpoint-700")

    assert _ask(capsys, "repair", "--yes", damaged)[0] == State.DAMAGED
    assert _steps(damaged) == [100, 200, 300, 600]

    old = (damaged / "checkpoint-600").stat().st_mtime - 3600
    for path in (damaged / "checkpoint-600", *(damaged / "checkpoint-600").rglob("*")):
        os.utime(path, (old, old))
    assert _ask(capsys, "repair", "--yes", damaged)[0] == State.OK
    assert _steps(damaged) == [100, 200, 300]


def test_repair_gives_no_manifest_to_a_checkpoint_that_would_run_code(tmp_path, capsys):
    folder = write_foreign(tmp_path, 100)
    pickled = b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00truetR."
    write_torch_file(folder / "global_step100/zero_pp_rank_1_mp_rank_00_model_states.pt", {}, pickled=pickled)

    code, output = _ask(capsys, "repair", "--yes", "--now", "--json", tmp_path)

    assert code == State.INCOMPLETE
    assert "loading it would run os system" in json.loads(output)["refused"][0]
    assert not (folder / MANIFEST).exists()


def test_prune_keeps_the_newest_the_best_and_what_is_protected(tmp_path, capsys):
    for step, loss in ((100, 0.5), (200, 0.9), (300, 0.8), (400, 0.7), (500, 0.6)):
        write_foreign(tmp_path, step, history=[{"step": step, "eval_loss": loss}])
    options = ("--keep-latest", 1, "--protect", "checkpoint-300")

    told = json.loads(_ask(capsys, "prune", "--json", tmp_path, *options)[1])
    assert told["wouldDelete"] == [str(tmp_path / f"checkpoint-{step}") for step in (200, 400)]
    assert _steps(tmp_path) == [100, 200, 300, 400, 500]

    code, output = _ask(capsys, "prune", "--yes", "--json", tmp_path, *options)
    assert (code, json.loads(output)["deleted"]) == (State.OK, told["wouldDelete"])
    assert _steps(tmp_path) == [100, 300, 500]


def test_prune_keeps_what_the_stock_trainer_calls_the_best(tmp_path, capsys):
    for step in (100, 200, 300):
        write_foreign(tmp_path, step, best=100)

    _ask(capsys, "prune", "--yes", tmp_path, "--keep-latest", 1)

    assert _steps(tmp_path) == [100, 300]


def test_garbage_goes_only_when_asked_and_only_before_a_checkpoint_that_verifies(damaged, capsys):
    write_foreign(damaged, 550)
    assert _ask(capsys, "prune", "--yes", damaged, "--keep-latest", 9)[0] == State.DAMAGED
    assert _steps(damaged) == [100, 200, 300, 400, 500, 550, 600, 700]

    # A flipped bit that only a full look finds: then nothing newer than 200 verifies, and nothing goes.
    shard = damaged / "checkpoint-550/global_step550/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    whole = shard.read_bytes()
    position = whole.index(b"\x01" * 64) + 9
    shard.write_bytes(whole[:position] + b"\x07" + whole[position + 1 :])
    _ask(capsys, "prune", "--yes", "--garbage", damaged, "--keep-latest", 9)
    assert _steps(damaged) == [100, 200, 300, 400, 500, 550, 600, 700]

    shard.write_bytes(whole)
    _ask(capsys, "prune", "--yes", "--garbage", damaged, "--keep-latest", 9)
    assert _steps(damaged) == [100, 200, 550, 600, 700]


def test_prune_relies_on_no_checkpoint_that_it_has_not_read_to_the_end(tmp_path, capsys):
    for step in (100, 200, 300, 400):
        write_checkpoint(tmp_path, step)
    for step in (300, 400):
        (tmp_path / f"checkpoint-{step}/global_step{step}/shard_0.pt").write_bytes(b"SHARD  0")
    (tmp_path / "checkpoint-200/global_step200/shard_0.pt").write_bytes(b"SHARD  0")

    _ask(capsys, "prune", "--yes", "--garbage", tmp_path, "--keep-latest", 1)

    assert _steps(tmp_path) == [100, 200, 300, 400]


def test_prune_finishes_a_deletion_that_was_cut_short(tmp_path, capsys):
    for step in (100, 200):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-100" / DELETING).touch()

    assert _ask(capsys, "ls", tmp_path)[0] == State.DAMAGED
    assert _ask(capsys, "prune", "--yes", tmp_path)[0] == State.OK
    assert _steps(tmp_path) == [200]


def test_prune_stops_when_an_attempt_starts(tmp_path):
    for step in (100, 200, 300):
        write_checkpoint(tmp_path, step)
    fence = build_fence(tmp_path)
    plan = plan_prune(confirm_newest(examine_folder(tmp_path)), Limits(1), "loss", (), with_garbage=False)
    (tmp_path / "attempt.json").write_text('{"attempt": 1}')

    with pytest.raises(TrainerError) as caught:
        delete_planned(plan, fence)
    assert caught.value.exit_code == ExitCode.FENCED
    assert _steps(tmp_path) == [100, 200, 300]


def test_plan_counts_the_room_from_the_parameters_for_both_trainers(tmp_path, capsys):
    options = ("--parameters", 6738415616, "--keep-latest", 3)
    answer = json.loads(_ask(capsys, "plan", "--json", tmp_path, *options)[1])
    assert answer["need"]["stock"] == {"checkpointBytes": 94_337_818_624, "peakBytes": 377_351_274_496}
    assert answer["need"]["ours"]["checkpointBytes"] == 12 * 6_738_415_616

    answer = json.loads(_ask(capsys, "plan", "--json", tmp_path, *options, "--zero-stage", 2)[1])
    assert answer["need"]["stock"]["checkpointBytes"] == 16 * 6_738_415_616
    assert answer["need"]["ours"]["checkpointBytes"] == 14 * 6_738_415_616


def test_plan_counts_the_parameters_of_a_model_folder(tmp_path, capsys):
    llama = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
    }  # fmt: skip
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(llama))
    assert json.loads(_ask(capsys, "plan", "--json", tmp_path, "--model", model)[1])["parameters"] == 6_738_415_616

    (model / "model.safetensors").write_bytes(build_safetensors({"a": (3, 4), "b": (5,)}))
    assert json.loads(_ask(capsys, "plan", "--json", tmp_path, "--model", model)[1])["parameters"] == 17

    (model / "model.safetensors").unlink()
    (model / "config.json").write_text('{"model_type": "mamba"}')
    assert main(["checkpoints", "plan", str(tmp_path), "--model", str(model)]) == ExitCode.NO_INPUT
    assert "--parameters" in capsys.readouterr().err


def test_plan_says_whether_it_fits(tmp_path, capsys):
    assert _ask(capsys, "plan", tmp_path, "--parameters", 1000)[0] == State.OK

    code, output = _ask(capsys, "plan", tmp_path, "--parameters", 10**15)
    assert code == State.INCOMPLETE
    assert "none fits" in output
    assert "NOT ENOUGH" in output
