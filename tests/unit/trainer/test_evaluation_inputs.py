"""Task files and models on a real S3 server, as an evaluation brings them onto the workspace."""

import json

import pytest

from finetune_contract.reports import Reason
from finetune_contract.run_config import DatasetConfig, EvaluationConfig, NamedModel, RunConfig, Source
from finetune_trainer.errors import TrainerError
from finetune_trainer.evaluation.models import fetch_models, open_model
from finetune_trainer.evaluation.task_files import fetch_tasks
from tests.support.model_bytes import build_model

PREFIX = "FINETUNE_TASKS_"


@pytest.fixture
def folder(s3_session, bucket, monkeypatch):
    """The folder of a bucket with a task; its credentials stand under a prefix."""
    for key, value in s3_session.variables.items():
        monkeypatch.setenv(PREFIX + key, value)
    folder = s3_session.folder / bucket
    (folder / "boats" / "data").mkdir(parents=True)
    (folder / "boats" / "boats.yaml").write_text("task: boats\n")
    (folder / "boats" / "data" / "rows.jsonl").write_text('{"question": "x"}\n')
    return folder


def test_a_task_file_comes_with_its_folder(folder, tmp_path):
    names = fetch_tasks(["gsm8k", f"s3://{folder.name}/boats/boats.yaml"], PREFIX, tmp_path)

    assert names[0] == "gsm8k"
    assert (tmp_path / names[1]).read_text() == "task: boats\n"
    assert (tmp_path / names[1]).with_name("data").joinpath("rows.jsonl").exists()


def test_changed_task_files_do_not_mix_with_those_of_before(folder, tmp_path):
    (before,) = fetch_tasks([f"s3://{folder.name}/boats/boats.yaml"], PREFIX, tmp_path)
    (folder / "boats" / "boats.yaml").write_text("task: sailing-ships\n")
    (after,) = fetch_tasks([f"s3://{folder.name}/boats/boats.yaml"], PREFIX, tmp_path)

    assert before != after
    assert (tmp_path / after).read_text() == "task: sailing-ships\n"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("boats/absent.yaml", "does not exist"),
        ("boats", "no task file"),
        ("boats.yaml", "no task file"),
    ],
)
def test_a_task_file_that_cannot_be_had_is_named(folder, tmp_path, name, words):
    with pytest.raises(TrainerError, match=rf"spec\.evaluation\.tasks\[1\].*{words}"):
        fetch_tasks(["gsm8k", f"s3://{folder.name}/{name}"], PREFIX, tmp_path)


def test_refused_credentials_name_the_secret(folder, tmp_path, monkeypatch):
    monkeypatch.setenv(f"{PREFIX}AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(TrainerError) as caught:
        fetch_tasks([f"s3://{folder.name}/boats/boats.yaml"], PREFIX, tmp_path)
    assert caught.value.reason == Reason.CREDENTIALS_REFUSED
    assert "spec.evaluation.secretRef" in caught.value.hint


def write_model(folder):
    folder.mkdir()
    for name, content in build_model().items():
        (folder / name).write_bytes(content)


def make_run(workspace, source):
    models = (NamedModel("earlier", source, secret_prefix=PREFIX),)
    return RunConfig(
        Source("x"), DatasetConfig(()), workspace=str(workspace), evaluation=EvaluationConfig(models=models)
    )


def test_a_further_model_is_sized_and_fetched_with_its_own_credentials(folder, tmp_path):
    write_model(folder / "model")
    run = make_run(tmp_path, f"s3://{folder.name}/model")

    assert open_model(run, 0).read_facts().num_bytes > 0
    fetched = fetch_models(run)["earlier"]

    assert json.loads((fetched / "config.json").read_text())
    assert fetch_models(run) == {"earlier": tmp_path / "models" / "evaluated" / "earlier"}


def test_another_revision_of_a_further_model_leaves_nothing_of_the_one_before(folder, tmp_path):
    write_model(folder / "model")
    (folder / "model" / "generation_config.json").write_text("{}")
    fetched = fetch_models(make_run(tmp_path, f"s3://{folder.name}/model"))["earlier"]
    assert (fetched / "generation_config.json").exists()
    (folder / "model" / "generation_config.json").unlink()

    fetch_models(make_run(tmp_path, f"s3://{folder.name}/model"))

    assert not (fetched / "generation_config.json").exists()


def test_a_further_model_that_is_none_is_named(folder, tmp_path):
    with pytest.raises(TrainerError, match=r"spec\.evaluation\.models\[0\]"):
        fetch_models(make_run(tmp_path, f"s3://{folder.name}/boats"))
    with pytest.raises(TrainerError, match=r"spec\.evaluation\.models\[0\]\.source"):
        fetch_models(make_run(tmp_path, "pvc://absent"))
