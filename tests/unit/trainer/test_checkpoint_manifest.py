"""What makes a checkpoint complete."""

import hashlib
import json

import pytest

from finetune_trainer.checkpoints.layout import MANIFEST, list_folders, parse_step
from finetune_trainer.checkpoints.manifest import read_manifest, verify_checkpoint
from tests.support.checkpoints import write_checkpoint


def test_a_committed_checkpoint_is_complete_at_both_levels(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 800)

    assert verify_checkpoint(checkpoint) == []
    assert verify_checkpoint(checkpoint, full=True) == []


def test_a_folder_without_manifest_is_an_unfinished_save(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 800)
    (checkpoint / MANIFEST).unlink()

    assert verify_checkpoint(checkpoint) == [f"no {MANIFEST}: the save did not finish"]


def test_a_manifest_cut_off_anywhere_is_not_believed(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 800)
    text = (checkpoint / MANIFEST).read_text()
    for length in range(0, len(text) - 2, 37):
        (checkpoint / MANIFEST).write_text(text[:length])

        assert verify_checkpoint(checkpoint), f"believed after {length} of {len(text)} characters"


@pytest.mark.parametrize(("field", "value"), [("step", 801), ("world_size", 4), ("attempt", 9)])
def test_an_edited_manifest_is_not_believed(tmp_path, field, value):
    checkpoint = write_checkpoint(tmp_path, 800)
    body = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps(body | {field: value}))

    assert verify_checkpoint(checkpoint) == ["the manifest's checksum does not match its content"]


def test_a_manifest_of_version_1_is_read_without_what_it_did_not_hold(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 800, metric=0.5)
    body = json.loads((checkpoint / MANIFEST).read_text())
    for name in ("checksum", "weights", "data_position", "random_states", "rows_per_step"):
        del body[name]
    body["version"] = 1
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (checkpoint / MANIFEST).write_text(json.dumps(body | {"checksum": checksum}))

    assert verify_checkpoint(checkpoint, full=True) == []
    manifest = read_manifest(checkpoint)
    assert (manifest.step, manifest.world_size, manifest.metrics) == (800, 2, {"eval_loss": 0.5})
    assert (manifest.weights, manifest.data_position, manifest.rows_per_step) == ({}, {}, 0)


def test_a_manifest_of_a_later_version_is_not_guessed_at(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 800)
    body = json.loads((checkpoint / MANIFEST).read_text())
    del body["checksum"]
    body["version"] = 3
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (checkpoint / MANIFEST).write_text(json.dumps(body | {"checksum": checksum}))

    assert verify_checkpoint(checkpoint) == ["the manifest has another version; read it with the release that wrote it"]


def test_a_missing_and_a_truncated_file_are_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 800)
    (checkpoint / "trainer_state.json").unlink()
    (checkpoint / "global_step800/shard_0.pt").write_bytes(b"sh")

    assert verify_checkpoint(checkpoint) == [
        "global_step800/shard_0.pt: has 2 bytes, not 8",
        "trainer_state.json: is missing",
    ]


def test_only_full_verification_finds_a_flipped_bit(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 800)
    shard = checkpoint / "global_step800/shard_1.pt"
    content = bytearray(shard.read_bytes())
    content[3] ^= 1
    shard.write_bytes(content)

    assert verify_checkpoint(checkpoint) == []
    assert verify_checkpoint(checkpoint, full=True) == [
        "global_step800/shard_1.pt: its content is not what was saved (SHA-256 differs)"
    ]


def test_a_renamed_folder_is_not_the_step_it_claims(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 800)
    moved = checkpoint.rename(tmp_path / "checkpoint-900")

    assert verify_checkpoint(moved) == ["the manifest is of step 800, the folder is checkpoint-900"]


def test_a_manifest_keeps_what_was_saved(tmp_path):
    manifest = read_manifest(write_checkpoint(tmp_path, 800, metric=1.25))

    assert (manifest.step, manifest.world_size, manifest.zero_stage, manifest.dtype) == (800, 2, 3, "bf16")
    assert manifest.metrics == {"eval_loss": 1.25}
    assert manifest.num_bytes == sum(entry.size for entry in manifest.files.values()) > 0


def test_folders_are_ordered_by_step_and_other_names_are_ignored(tmp_path):
    for name in ("checkpoint-90", "checkpoint-1000", "checkpoint-9", "checkpoint-x", "quarantine", "checkpoint-5.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")

    assert [folder.step for folder in list_folders(tmp_path)] == [9, 90, 1000]
    assert list_folders(tmp_path / "absent") == []
    assert parse_step("checkpoint-") is None
