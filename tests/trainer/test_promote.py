"""A promoted model is whole, has the name of its content, and says where it comes from."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.checkpoints.layout import MANIFEST, checkpoint_name
from finetune_trainer.checkpoints.manifest import list_files, read_manifest, seal_files, write_manifest
from finetune_trainer.errors import TrainerError
from finetune_trainer.promotion import promoted
from finetune_trainer.storage.publish import PROVENANCE
from tests.support.training_runs import SMALL, Run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, models, data):
    """A workspace with checkpoints 2 and 4, not to be changed."""
    settings = (*SMALL, "checkpoint.every_steps=2", "training.zero_stage=2")
    run = Run(tmp_path_factory.mktemp("trained"), models["llama"], data, settings)
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


def test_a_process_of_its_own_promotes_as_a_pod_does(run):
    command = (sys.executable, "-m", "finetune_trainer", *run.words("promote"))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert run.workspace.promoted_model(ended.stdout.split()[-1]).is_dir()


@contextlib.contextmanager
def _noting_weights(path):
    """Have rank 0 write the weights that the model itself has at the end of training."""
    from finetune_trainer.training.trainer import ContractTrainer

    def note_and_commit(trainer):
        engine = trainer.model_wrapped
        is_partitioned = engine.zero_optimization_stage() == 3
        whole = engine._zero3_consolidated_16bit_state_dict() if is_partitioned else engine.module.state_dict()
        if trainer.args.should_save:
            _save(whole, path)
        commit(trainer)

    commit = ContractTrainer.commit_last
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContractTrainer, "commit_last", note_and_commit)
        yield


def _save(tensors, path):
    from safetensors.torch import save_file

    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, path)


def _rewrite(run, step, change):
    """Change the weights of a checkpoint and commit it again, as a faulty save would have."""
    import torch

    folder = run.workspace.checkpoints / checkpoint_name(step)
    manifest = read_manifest(folder)
    path = folder / f"global_step{step}" / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    change(state["module"])
    torch.save(state, path)
    (folder / MANIFEST).unlink()
    write_manifest(folder, dataclasses.replace(manifest, files=seal_files(folder, list_files(folder))))


@pytest.mark.parametrize(
    ("family", "stage", "precision"),
    [("llama", 1, "bf16"), ("llama", 2, "bf16"), ("llama", 3, "bf16"), ("mpt", 3, "bf16"), ("mpt", 2, "fp32")],
)
def test_the_promoted_weights_are_those_of_the_model_to_the_bit(make_run, tmp_path, family, stage, precision):
    from safetensors.torch import load_file

    run = make_run(family, "workspace", f"training.zero_stage={stage}", f"training.precision={precision}")
    with _noting_weights(tmp_path / "own.safetensors"):
        run.train("training.max_steps=3")

    folder = _promote(run)

    own, served = load_file(tmp_path / "own.safetensors"), load_file(folder / "model.safetensors")
    assert not list((run.workspace.checkpoints / "checkpoint-3").glob("*.safetensors"))
    assert served.keys() <= own.keys()
    assert all(served[name].equal(own[name].to(served[name].dtype)) for name in served)
    # Tied weights are in the file once.
    assert all(own[name].equal(own["transformer.wte.weight"]) for name in own.keys() - served.keys())
    assert served.keys() <= run.manifests()[3].weights.keys()


def test_the_last_checkpoint_is_promoted_under_the_digest_of_its_content(run):
    folder = _promote(run)
    report = run.report("promote")

    assert report["details"]["checkpoint_step"] == 4
    assert (
        folder.name
        == report["details"]["digest"]
        == promoted.make_digest(seal_files(folder, promoted.list_content(folder)))
    )
    weights = run.manifests()[4].weights
    assert report["details"]["parameters"] == sum(weight.count for weight in weights.values())


def test_the_folder_answers_greedily_and_says_where_it_comes_from(run):
    folder = _promote(run)

    generation = json.loads((folder / "generation_config.json").read_text())
    provenance = json.loads((folder / PROVENANCE).read_text())
    assert generation.get("do_sample", False) is False
    assert generation["eos_token_id"] is not None
    assert json.loads((folder / "config.json").read_text()).get("use_cache", True) is True
    assert (folder / "chat_template.jinja").exists()
    assert provenance["checkpoint"]["step"] == 4
    assert provenance["base_model"]["source"] == str(run.model)
    assert provenance["digest"] == folder.name
    assert provenance["versions"]["deepspeed"]
    assert provenance["training"]["recipe"] == "efficient"
    assert provenance["restarts"] == {"total": 0, "by_reason": {}, "steps_lost": 0}
    assert provenance["parameters"] == run.report("promote")["details"]["parameters"]


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
    [
        (_empty, "model.norm.weight"),
        (_cut, "lm_head.weight"),
        (_drop, "up_proj.weight the shape None"),
        (_spoil, "not finite"),
    ],
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
    path = run.workspace.checkpoints / "checkpoint-4" / "global_step4" / "mp_rank_00_model_states.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)

    assert run.call("promote") == ExitCode.INTERNAL
    report = run.report("promote")
    assert report["reason"] == Reason.CHECKPOINT_INVALID
    assert "checkpoint-4 is damaged: global_step4/mp_rank_00_model_states.pt" in report["message"]


def test_a_damaged_promoted_folder_is_refused_by_name(run):
    folder = _promote(run)
    (folder / "tokenizer.json").unlink()

    with pytest.raises(TrainerError, match=r"tokenizer\.json is missing"):
        promoted.read_manifest(folder)
    assert run.call("evaluate") == ExitCode.NO_INPUT


def test_a_foreign_folder_under_the_digest_is_refused_by_name_and_kept(run):
    folder = _promote(run)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "notes.txt").write_text("somebody's own")

    assert run.call("promote") == ExitCode.NO_INPUT
    report = run.report("promote")
    assert report["reason"] == Reason.PROMOTION_INVALID
    assert str(folder) in report["message"]
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_the_best_cannot_be_promoted_when_none_was_measured(run):
    assert run.call("promote", "promotion.select=best") == ExitCode.CONFIG
    assert "spec.checkpoint.retention.best" in run.report("promote")["hint"]


def test_there_is_nothing_to_promote_before_training(make_run):
    empty = make_run()

    assert empty.call("promote") == ExitCode.NO_INPUT
    assert "no complete checkpoint" in empty.report("promote")["message"]
