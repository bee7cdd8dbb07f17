"""Weight diffs: the tuned folder comes back to the byte, from this base only, and damage is named."""

import json
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file, save_file

from finetune_trainer.errors import TrainerError
from finetune_trainer.weight_diff import bits, tensors
from finetune_trainer.weight_diff.make import make_diff
from finetune_trainer.weight_diff.record import NAME, read_record
from finetune_trainer.weight_diff.recover import recover_model, verify_diff, verify_side


def write_model(folder, shards, **files):
    folder.mkdir()
    for index, shard in enumerate(shards, start=1):
        save_file(shard, folder / f"model-{index:05d}-of-{len(shards):05d}.safetensors", metadata={"format": "pt"})
    for name, text in {"config.json": '{"model_type": "llama"}', **files}.items():
        (folder / name).write_text(text)
    return folder


def read_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def numbers():
    return np.random.default_rng(7)


@pytest.fixture
def base(tmp_path, numbers):
    first = {"embed": numbers.normal(size=(64, 8)).astype("f2"), "norm": np.ones(8, "f4")}
    return write_model(tmp_path / "llama-7b", [first, {"up": numbers.normal(size=(8, 32)).astype("f4")}])


@pytest.fixture
def tuned(tmp_path, base, numbers):
    shards = [load_file(path) for path in sorted(base.glob("*.safetensors"))]
    moved = {
        name: (value + numbers.normal(size=value.shape) / 1000).astype(value.dtype) for name, value in shards[0].items()
    }
    # One row more, as a padding token needs, and a head that the base ties to its embeddings.
    moved["embed"] = np.concatenate([moved["embed"], np.zeros((1, 8), "f2")])
    return write_model(tmp_path / "tuned", [moved, shards[1] | {"head": shards[1]["up"] + 1}], tokenizer="{}")


@pytest.fixture
def diff(tmp_path, base, tuned, monkeypatch):
    # Small stretches, so that tensors of a test have several.
    for module in ("make", "recover", "record", "tensors"):
        monkeypatch.setattr(f"finetune_trainer.weight_diff.{module}.STRETCH_ELEMENTS", 100)
    make_diff(base, tuned, tmp_path / "diff")
    return tmp_path / "diff"


BIT_PATTERNS = strategies.sampled_from(["u1", "<u2", "<u4", "<u8"]).flatmap(
    lambda dtype: strategies.integers(0, 37).flatmap(
        lambda length: strategies.tuples(
            arrays.arrays(dtype, length), arrays.arrays(dtype, strategies.integers(0, length))
        )
    )
)
TYPES = {1: "U8", 2: "BF16", 4: "F32", 8: "F64"}


@hypothesis.given(BIT_PATTERNS)
def test_any_bits_come_back(sides):
    tuned, base = sides
    dtype = TYPES[tuned.dtype.itemsize]
    packed = bits.encode(base, tuned)
    assert packed.size == bits.count_packed(len(tuned), dtype)
    assert (bits.decode(base, packed.tobytes(), len(tuned), dtype) == tuned).all()


@pytest.mark.parametrize("width", TYPES)
@pytest.mark.parametrize("length", [(1 << 16) - 1, 1 << 16, (1 << 16) + 3, 200_000])
def test_bits_come_back_over_the_borders_of_blocks(numbers, width, length):
    tuned, base = (numbers.integers(0, 256, size=length * width, dtype="u1").view(f"<u{width}") for _ in range(2))
    packed = bits.encode(base[: length - 5], tuned)
    assert (bits.decode(base[: length - 5], packed.tobytes(), length, TYPES[width]) == tuned).all()


def test_small_differences_fill_few_planes(numbers):
    base = numbers.integers(0, 1 << 15, size=4096, dtype="<u2")
    packed = bits.encode(base, base + numbers.integers(-2, 3, size=4096).astype("<u2"))
    # Numbers from -2 to 2 are 0 to 4 in zigzag coding: three bits of sixteen.
    assert not packed[3 * 512 :].any()
    assert packed[: 3 * 512].any()


def test_a_float_is_rounded_to_the_even_bfloat16():
    values = np.array([1.0, 1.00390625, 1.01171875, -2.5, np.inf, np.nan, 3.4e38], "<f4").view("<u4")
    assert [hex(value) for value in bits.convert(values, "F32", "BF16")] == [
        *("0x3f80", "0x3f80", "0x3f82", "0xc020", "0x7f80", "0x7fc0", "0x7f80")
    ]
    assert bits.convert(np.array([0x3F80], "<u2"), "BF16", "F16").view("<f2")[0] == 1.0


def test_the_tuned_folder_comes_back_to_the_byte(tmp_path, base, tuned, diff):
    recover_model(base, diff, tmp_path / "recovered")
    assert read_files(tmp_path / "recovered") == read_files(tuned)


def test_the_base_may_be_spread_over_other_files(tmp_path, base, tuned, diff):
    whole = {name: value for path in base.glob("*.safetensors") for name, value in load_file(path).items()}
    recover_model(write_model(tmp_path / "merged", [whole]), diff, tmp_path / "recovered")
    assert read_files(tmp_path / "recovered") == read_files(tuned)


def test_a_base_of_another_float_type_is_converted(tmp_path, base, diff, tuned):
    halved = [
        {name: value.astype("f2") for name, value in load_file(path).items()}
        for path in sorted(base.glob("*.safetensors"))
    ]
    other = write_model(tmp_path / "half", halved)
    make_diff(other, tuned, tmp_path / "diff-2")
    recover_model(other, tmp_path / "diff-2", tmp_path / "recovered")
    assert read_files(tmp_path / "recovered") == read_files(tuned)


def test_a_tuned_model_with_fewer_rows_comes_back(tmp_path, base, tuned):
    make_diff(tuned, base, tmp_path / "back")
    recover_model(tuned, tmp_path / "back", tmp_path / "recovered")
    assert read_files(tmp_path / "recovered") == read_files(base)


def test_what_did_not_change_takes_no_room(tmp_path, base):
    same = {"up": np.random.default_rng(1).normal(size=(512, 512)).astype("f4")}
    first, second = write_model(tmp_path / "first", [same]), write_model(tmp_path / "second", [same])
    made = make_diff(first, second, tmp_path / "diff")
    assert made.diff_bytes < made.tuned_bytes / 100


def test_another_base_is_refused_by_name_and_leaves_nothing(tmp_path, base, diff):
    path = sorted(base.glob("*.safetensors"))[1]
    values = load_file(path)
    values["up"][3, 3] += 1
    other = write_model(tmp_path / "llama-13b", [load_file(min(base.glob("*.safetensors"))), values])
    with pytest.raises(TrainerError, match=r"llama-13b is not the base model of this diff: tensor up .*'llama-7b'"):
        recover_model(other, diff, tmp_path / "recovered")
    assert not [path for path in tmp_path.iterdir() if "recovered" in path.name]


def test_models_of_different_architectures_are_refused(tmp_path, base):
    other = write_model(tmp_path / "wide", [{"embed": np.zeros((64, 16), "f2")}])
    with pytest.raises(TrainerError, match="embed has shapes"):
        make_diff(base, other, tmp_path / "diff")
    assert not (tmp_path / "diff").exists()


def test_an_existing_folder_is_never_written_to(tmp_path, base, tuned):
    (tmp_path / "mine").mkdir()
    with pytest.raises(TrainerError, match="mine exists"):
        make_diff(base, tuned, tmp_path / "mine")


def test_a_flipped_bit_is_found_by_verify_and_by_recover(tmp_path, base, diff):
    path = next(diff.glob("*.zst"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(TrainerError, match="other content"):
        verify_diff(diff)
    with pytest.raises(TrainerError, match=r"cannot be decompressed|does not come out"):
        recover_model(base, diff, tmp_path / "recovered")
    assert not (tmp_path / "recovered").exists()


def test_verify_tells_both_sides_apart(base, tuned, diff):
    record = verify_diff(diff)
    for side, folder in (("base", base), ("tuned", tuned)):
        verify_side(record, folder, side, lambda _: None)
    with pytest.raises(TrainerError, match="is not the tuned model"):
        verify_side(record, base, "tuned", lambda _: None)


@pytest.mark.parametrize("name", ["../escape", "/etc/escape"])
def test_a_diff_from_elsewhere_cannot_name_files_outside(diff, name):
    record = json.loads((diff / NAME).read_text())
    record["companions"][name] = {"size": 0, "sha256": ""}
    (diff / NAME).write_text(json.dumps(record))
    with pytest.raises(TrainerError, match="damaged"):
        read_record(diff)


def test_a_cut_file_is_named(tmp_path, base, tuned):
    path = min(tuned.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(TrainerError, match="its header says"):
        tensors.list_tensors(tuned, "--tuned")


def test_the_command_makes_verifies_and_recovers_without_torch(tmp_path, base, tuned):
    def run(*options):
        program = (
            "import sys; sys.modules['torch'] = None; from finetune_trainer.__main__ import main; sys.exit(main())"
        )
        command = (sys.executable, "-c", program, "weight-diff", *map(str, options), "--json")
        return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    made = run("make", "--base", base, "--tuned", tuned, "--out", tmp_path / "diff")
    assert made["ratio"] == pytest.approx(made["diffBytes"] / made["tunedBytes"], abs=1e-4)
    assert run("verify", "--diff", tmp_path / "diff", "--base", base)["diff"] == "whole"
    run("recover", "--base", base, "--diff", tmp_path / "diff", "--out", tmp_path / "recovered")
    assert read_files(tmp_path / "recovered") == read_files(tuned)
