"""A promoted model is whole, has the name of its content, and says where it comes from."""

import dataclasses
import json
import shutil

import pytest

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.checkpoints.layout import MANIFEST, checkpoint_name
from finetune_trainer.checkpoints.manifest import list_files, read_manifest, seal_files, write_manifest
from finetune_trainer.errors import TrainerError
from finetune_trainer.promotion import promoted
from tests.support.training_runs import SMALL, Run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, models, data):
    """A workspace with checkpoints 2 and 4, not to be changed."""
    run = Run(tmp_path_factory.mktemp("trained"), models["llama"], data, (*SMALL, "checkpoint.every_steps=2"))
    run.train("training.max_steps=4")
    return run


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that workspace."""
    shutil.copytree(trained.root, tmp_path / "copy")
    return dataclasses.replace(trained, root=tmp_path / "copy")


def _promote(run, *settings):
    assert run.call("promote", *settings) == 0, run.report("promote")
    return run.workspace.promoted_model(run.report("promote")["details"]["digest"])


def _rewrite(run, step, change):
    """Change the weights of a checkpoint and commit it again, as a faulty save would have."""
    from safetensors.torch import load_file, save_file

    folder = run.workspace.checkpoints / checkpoint_name(step)
    manifest = read_manifest(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / MANIFEST).unlink()
    write_manifest(folder, dataclasses.replace(manifest, files=seal_files(folder, list_files(folder))))


def test_the_last_checkpoint_is_promoted_under_the_digest_of_its_content(run):
    from safetensors.torch import load_file

    folder = _promote(run)
    report = run.report("promote")

    assert report["details"]["checkpoint_step"] == 4
    assert (
        folder.name
        == report["details"]["digest"]
        == promoted.make_digest(seal_files(folder, promoted.list_content(folder)))
    )
    saved = load_file(run.workspace.checkpoints / "checkpoint-4" / "model.safetensors")
    served = load_file(folder / "model.safetensors")
    assert served.keys() == saved.keys()
    assert all(served[name].equal(tensor) for name, tensor in saved.items())
    assert report["details"]["parameters"] == sum(tensor.numel() for tensor in saved.values())


def test_the_folder_answers_greedily_and_says_where_it_comes_from(run):
    folder = _promote(run)

    generation = json.loads((folder / "generation_config.json").read_text())
    provenance = json.loads((folder / promoted.PROVENANCE).read_text())
    assert generation.get("do_sample", False) is False
    assert generation["eos_token_id"] is not None
    assert json.loads((folder / "config.json").read_text()).get("use_cache", True) is True
    assert (folder / "chat_template.jinja").exists()
    assert provenance["checkpoint"]["step"] == 4
    assert provenance["base_model"]["source"] == str(run.model)
    assert provenance["digest"] == folder.name
    assert provenance["versions"]["deepspeed"]


def test_promoting_again_uses_the_folder_again_and_changes_nothing(run):
    folder = _promote(run)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    assert _promote(run) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert [path.name for path in run.workspace.output.iterdir()] == [folder.name]


def test_an_earlier_model_stays_when_another_is_promoted(run):
    first = _promote(run)
    run.train("training.max_steps=6")

    second = _promote(run)

    assert second != first
    assert promoted.read_manifest(first)
    assert promoted.read_manifest(second)


def _empty(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:0].clone()


def _cut(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()


def _drop(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _spoil(tensors):
    tensors["model.layers.0.self_attn.q_proj.weight"][3, 5] = float("nan")


@pytest.mark.parametrize(
    ("change", "said"),
    [(_empty, "model.norm.weight"), (_cut, "lm_head.weight"), (_drop, "missing"), (_spoil, "not finite")],
)
def test_weights_that_are_not_whole_are_never_published(run, change, said):
    _rewrite(run, 4, change)

    code = run.call("promote")

    report = run.report("promote")
    assert code == ExitCode.INTERNAL
    assert report["reason"] == Reason.PROMOTION_INVALID
    assert said in report["message"], report
    assert list(run.workspace.output.iterdir()) == []


def test_a_model_equal_to_its_base_is_never_published(run, models):
    from safetensors.torch import load_file

    base = load_file(models["llama"] / "model.safetensors")
    _rewrite(run, 4, lambda tensors: tensors.update(base))

    assert run.call("promote") == ExitCode.INTERNAL
    assert "equals the base" in run.report("promote")["message"]
    assert list(run.workspace.output.iterdir()) == []


def test_a_checkpoint_with_a_flipped_bit_is_not_promoted(run):
    path = run.workspace.checkpoints / "checkpoint-4" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 4
    path.write_bytes(content)

    assert run.call("promote") == ExitCode.INTERNAL
    report = run.report("promote")
    assert report["reason"] == Reason.CHECKPOINT_INVALID
    assert "checkpoint-4 is damaged: model.safetensors" in report["message"]


def test_a_damaged_promoted_folder_is_refused_by_name(run):
    folder = _promote(run)
    (folder / "tokenizer.json").unlink()

    with pytest.raises(TrainerError, match=r"tokenizer\.json is missing"):
        promoted.read_manifest(folder)
    assert run.call("evaluate") == ExitCode.NO_INPUT


def test_the_best_cannot_be_promoted_when_none_was_measured(run):
    assert run.call("promote", "promotion.select=best") == ExitCode.CONFIG
    assert "spec.checkpoint.retention.best" in run.report("promote")["hint"]


def test_there_is_nothing_to_promote_before_training(make_run):
    empty = make_run()

    assert empty.call("promote") == ExitCode.NO_INPUT
    assert "no complete checkpoint" in empty.report("promote")["message"]
