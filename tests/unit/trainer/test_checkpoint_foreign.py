"""Checkpoints of the stock Trainer: what is whole, and each way of being damaged."""

import json
import os
import shutil

import pytest

from finetune_trainer.checkpoints.findings import Fault
from finetune_trainer.checkpoints.foreign import SENTINEL, examine_foreign, list_names
from tests.support import foreign
from tests.support.foreign import write_foreign, write_plain, write_torch_file
from tests.support.model_bytes import build_safetensors

OPTIMIZER = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def _shard(folder, rank=0):
    return folder / folder.name.replace("checkpoint-", "global_step") / OPTIMIZER.format(rank)


def _cut(path, keep=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def _set_state(folder, **fields):
    path = folder / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _write_empty_weights(folder):
    (folder / "model.safetensors").write_bytes(build_safetensors({"embed.weight": (0,), "head.weight": (0,)}))


def _write_index(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _swap_storage(folder):
    """A shard whose table of contents is whole and whose tensors are not what they claim to be."""
    content = foreign.build_optimizer(0, 2)
    write_torch_file(_shard(folder), content)
    other = folder / "other.pt"
    write_torch_file(other, {"a": foreign.Shape((3,)), "b": foreign.Shape((3,))})
    import zipfile

    with zipfile.ZipFile(_shard(folder)) as archive:
        pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    write_torch_file(_shard(folder), {"a": foreign.Shape((3,)), "b": foreign.Shape((3,))}, pickled=pickled)
    other.unlink()


DAMAGES = {
    "latest missing": (lambda f: (f / "latest").unlink(), Fault.LATEST_MISSING, "latest is missing"),
    "latest empty": (lambda f: (f / "latest").write_text(""), Fault.LATEST_MISSING, "latest: is empty"),
    "latest dangling": (
        lambda f: (f / "latest").write_text("global_step90"),
        Fault.LATEST_DANGLING,
        "latest names 'global_step90', which is not there (there: global_step100)",
    ),
    "no state": (lambda f: (f / "trainer_state.json").unlink(), Fault.STATE_MISSING, "trainer_state.json is missing"),
    "half a state": (lambda f: _cut(f / "trainer_state.json"), Fault.STATE_DAMAGED, "is not whole JSON"),
    "state without step": (lambda f: _set_state(f, global_step=None), Fault.STATE_DAMAGED, "names no global_step"),
    "empty state": (
        lambda f: (f / "trainer_state.json").write_text(""),
        Fault.FILE_EMPTY,
        "trainer_state.json: is empt",
    ),
    "truncated shard": (lambda f: _cut(_shard(f)), Fault.FILE_DAMAGED, "is truncated"),
    "one byte less": (lambda f: _cut(_shard(f), 0.9999), Fault.FILE_DAMAGED, "is truncated"),
    "empty shard": (
        lambda f: _shard(f).write_bytes(b""),
        Fault.FILE_EMPTY,
        "rank_0_mp_rank_00_optim_states.pt: is empty",
    ),
    "shard of zeros": (
        lambda f: _shard(f).write_bytes(bytes(5000)),
        Fault.FILE_DAMAGED,
        "holds 5000 zero bytes: its content never reached the disk",
    ),
    "shard of something else": (lambda f: _shard(f).write_bytes(b"<html>" * 9), Fault.FILE_DAMAGED, "torch.save wrote"),
    "shard with other tensors": (_swap_storage, Fault.FILE_DAMAGED, "do not have the size that it gives them"),
    "shard missing": (
        lambda f: _shard(f, 1).unlink(),
        Fault.SHARDS_MISSING,
        "global_step100: 1 of 2 optimizer shards are missing: rank 1",
    ),
    "model shard missing": (
        lambda f: (f / "global_step100/zero_pp_rank_1_mp_rank_00_model_states.pt").unlink(),
        Fault.SHARDS_MISSING,
        "1 of 2 model shards are missing: rank 1",
    ),
    "shard of another run": (
        lambda f: shutil.copy(_shard(f), _shard(f, 7)),
        Fault.SHARDS_MISSING,
        "3 optimizer shards, but the state inside is of 2 ranks",
    ),
    "random state missing": (
        lambda f: (f / "rng_state_1.pth").unlink(),
        Fault.SHARDS_MISSING,
        "1 of 2 random states are missing: rng_state_1.pth",
    ),
    "no shards": (lambda f: shutil.rmtree(f / "global_step100"), Fault.SHARDS_MISSING, "no folder global_stepN"),
    "state of another step": (
        lambda f: _set_state(f, global_step=90),
        Fault.STEP_MISMATCH,
        "trainer_state.json is of step 90, the folder is checkpoint-100",
    ),
    "shards of another step": (
        lambda f: write_torch_file(
            f / "global_step100/zero_pp_rank_0_mp_rank_00_model_states.pt",
            foreign.build_model_state(90, 2, 3, {}),
        ),
        Fault.STEP_MISMATCH,
        "the shards in global_step100 are of step 90, the checkpoint is of step 100",
    ),
    "empty weights": (
        _write_empty_weights,
        Fault.WEIGHTS_EMPTY,
        "2 of 2 weights have shape (0,), such as embed.weight",
    ),
    "truncated weights": (
        lambda f: _cut(f / "model.safetensors"),
        Fault.FILE_DAMAGED,
        "model.safetensors: is truncated: it has ",
    ),
    "weights cut in their header": (
        lambda f: _cut(f / "model.safetensors", 0.02),
        Fault.FILE_DAMAGED,
        "end inside the header",
    ),
    "weights that are none": (
        lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs"),
        Fault.FILE_DAMAGED,
        "model.safetensors: is no whole safetensors file",
    ),
    "a file of the index missing": (
        _write_index,
        Fault.FILE_MISSING,
        "1 of 2 files that model.safetensors.index.json names are missing: model-00002-of-00002.safetensors",
    ),
    "index missing": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00001.safetensors"),
        Fault.FILE_MISSING,
        "model.safetensors.index.json is missing",
    ),
    "interrupted save": (
        lambda f: (f / SENTINEL).write_text("saving"),
        Fault.SAVE_UNFINISHED,
        f"{SENTINEL} is there: the save on SIGTERM did not finish",
    ),
    "nothing left": (lambda f: [shutil.rmtree(f), f.mkdir()], Fault.EMPTY_FOLDER, "the folder is empty"),
}


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_a_whole_checkpoint_has_no_findings(tmp_path, zero_stage, ranks):
    folder = write_foreign(tmp_path, 100, ranks=ranks, zero_stage=zero_stage)

    for full in (False, True):
        findings, facts = examine_foreign(folder, full)
        assert findings == ()
        assert (facts.state_step, facts.world_size, facts.zero_stage) == (100, ranks, zero_stage)
        assert facts.num_bytes == sum((folder / name).stat().st_size for name in list_names(folder))
        assert facts.notes == ()


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_found_by_the_quick_look_and_named(tmp_path, damage):
    inflict, fault, text = DAMAGES[damage]
    folder = write_foreign(tmp_path, 100)
    inflict(folder)

    for full in (False, True):
        findings, _ = examine_foreign(folder, full)
        assert fault in {finding.fault for finding in findings}
        assert any(text in finding.text for finding in findings if finding.fault is fault), findings


def test_a_flipped_bit_in_a_shard_is_found_by_reading_every_byte(tmp_path):
    folder = write_foreign(tmp_path, 100)
    content = bytearray(_shard(folder, 1).read_bytes())
    position = content.index(b"\x01" * 64) + 20  # in the numbers of a tensor
    content[position] ^= 4
    _shard(folder, 1).write_bytes(content)

    assert examine_foreign(folder)[0] == ()
    (finding,) = examine_foreign(folder, full=True)[0]
    assert finding.fault is Fault.FILE_DAMAGED
    assert "CRC-32 differs" in finding.text
    assert OPTIMIZER.format(1) in finding.text


def test_a_shard_whose_records_carry_no_checksums_is_whole_for_what_can_be_told(tmp_path):
    folder = write_foreign(tmp_path, 100)
    content = bytearray(_shard(folder, 1).read_bytes())
    # PyTorch leaves them out, as 0, after `set_crc32_options(False)`; they stand in both headers of each record.
    for signature, offset in ((b"PK\x03\x04", 14), (b"PK\x01\x02", 16)):
        position = content.find(signature)
        while position >= 0:
            content[position + offset : position + offset + 4] = bytes(4)
            position = content.find(signature, position + 4)
    _shard(folder, 1).write_bytes(content)

    assert examine_foreign(folder, full=True)[0] == ()


def test_only_reading_every_state_finds_a_rank_of_another_step(tmp_path):
    folder = write_foreign(tmp_path, 100)
    path = folder / "global_step100/zero_pp_rank_1_mp_rank_00_model_states.pt"
    write_torch_file(path, foreign.build_model_state(90, 2, 3, {}))

    assert examine_foreign(folder)[0] == ()
    assert [finding.fault for finding in examine_foreign(folder, full=True)[0]] == [Fault.STEP_MISMATCH]


def test_the_last_rank_missing_everywhere_is_known_from_the_state_of_the_others(tmp_path):
    folder = write_foreign(tmp_path, 100, ranks=4)
    for path in folder.rglob("*"):
        if "rank_3_" in path.name or path.name == "rng_state_3.pth":
            path.unlink()

    texts = [finding.text for finding in examine_foreign(folder)[0]]
    assert "global_step100: 1 of 4 optimizer shards are missing: rank 3" in texts
    assert "global_step100: 1 of 4 model shards are missing: rank 3" in texts
    assert "1 of 4 random states are missing: rng_state_3.pth" in texts


def test_placeholders_belong_into_the_model_shards_of_zero_3_and_nowhere_else(tmp_path):
    folder = write_foreign(tmp_path, 100, zero_stage=2)
    empty = dict.fromkeys(foreign.SHAPES, (0,))
    model = foreign.build_model_state(100, 2, 2, empty)
    write_torch_file(folder / "global_step100/mp_rank_00_model_states.pt", model)

    (finding,) = examine_foreign(folder)[0]
    assert finding.fault is Fault.WEIGHTS_EMPTY
    assert "mp_rank_00_model_states.pt: 2 of 2 weights have shape (0,)" in finding.text


def test_pickled_weights_are_looked_into_without_unpickling(tmp_path):
    folder = write_foreign(tmp_path, 100)
    (folder / "model.safetensors").unlink()
    write_torch_file(folder / "pytorch_model.bin", {"embed.weight": foreign.Shape((0,))})

    assert [finding.fault for finding in examine_foreign(folder)[0]] == [Fault.WEIGHTS_EMPTY]


def test_zero_3_without_gathered_weights_is_whole(tmp_path):
    folder = write_foreign(tmp_path, 100)
    (folder / "model.safetensors").unlink()

    assert examine_foreign(folder, full=True)[0] == ()


def test_a_companion_that_the_other_checkpoints_have_is_missed_and_else_only_noted(tmp_path):
    folder = write_foreign(tmp_path, 100)
    (folder / "scheduler.pt").unlink()

    findings, facts = examine_foreign(folder)
    assert findings == ()
    assert facts.notes == ("scheduler.pt is missing: the Trainer cannot set the learning rate",)

    findings, facts = examine_foreign(folder, usual={"scheduler.pt"})
    assert [finding.fault for finding in findings] == [Fault.FILE_MISSING]
    assert facts.notes == ()


def test_a_checkpoint_without_deepspeed_is_judged_by_its_own_files(tmp_path):
    folder = write_plain(tmp_path, 100)
    assert examine_foreign(folder, full=True)[0] == ()

    _cut(folder / "optimizer.pt")
    assert [finding.fault for finding in examine_foreign(folder)[0]] == [Fault.FILE_DAMAGED]
    (folder / "optimizer.pt").unlink()
    (finding,) = examine_foreign(folder)[0]
    assert finding.fault is Fault.OPTIMIZER_MISSING
    assert "save_only_model" in finding.text
    (folder / "model.safetensors").unlink()
    assert Fault.WEIGHTS_MISSING in {finding.fault for finding in examine_foreign(folder)[0]}


def test_metrics_and_the_best_step_are_read_from_the_trainers_log(tmp_path):
    history = [{"step": 50, "eval_loss": 2.0}, {"step": 100, "loss": 1.5}, {"step": 100, "eval_loss": 1.25}]
    _, facts = examine_foreign(write_foreign(tmp_path, 100, history=history, best=50))

    assert facts.metrics == {"eval_loss": 1.25}
    assert facts.best_step == 50


def test_a_file_that_the_disk_refuses_to_read_is_named(tmp_path, monkeypatch):
    folder = write_foreign(tmp_path, 100)
    refused = folder / "config.json"
    real = os.open

    def fail(path, *arguments, **options):
        if os.fspath(path) == str(refused):
            raise OSError(5, "Input/output error", path)
        return real(path, *arguments, **options)

    import io

    opened = io.open
    monkeypatch.setattr(
        io, "open", lambda path, *a, **k: fail(path) if os.fspath(path) == str(refused) else opened(path, *a, **k)
    )

    (finding,) = examine_foreign(folder, full=True)[0]
    assert finding.text == "config.json: cannot be read: Input/output error"
