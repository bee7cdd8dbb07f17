"""The fixed face of `finetune-trainer checkpoints`."""

import json

from finetune_contract.reports import ExitCode
from finetune_trainer.__main__ import main
from finetune_trainer.checkpoints.layout import MANIFEST
from tests.support.checkpoints import write_checkpoint


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
    assert "resume from: " + str(tmp_path / "checkpoints/checkpoint-100") in output


def test_a_missing_folder_is_an_error_that_names_it(tmp_path, capsys):
    assert main(["checkpoints", "ls", str(tmp_path / "absent")]) == ExitCode.NO_INPUT
    assert str(tmp_path / "absent") in capsys.readouterr().err


def test_an_empty_folder_means_training_begins_anew(tmp_path, capsys):
    answer = json.loads(_ask(capsys, "ls", "--json", tmp_path)[1])

    assert answer == {"checkpoints": [], "resumeFrom": None}
