"""Pickles of unknown origin are read as data: nothing in them runs."""

import os
import pathlib
import pickle

import pytest

from finetune_trainer.checkpoints.containers import read_torch_pickle
from finetune_trainer.checkpoints.pickles import Call, PickleError, list_tensors, read_pickle
from tests.support.foreign import Shape, write_torch_file


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_what_a_pickle_wants_to_run_is_only_noted(tmp_path, protocol):
    fuse = tmp_path / "ran"
    content = pickle.dumps({"step": 7, "state": Bomb(fuse)}, protocol)

    read = read_pickle(content)

    assert read["step"] == 7
    assert isinstance(read["state"], Call)
    assert read["state"].name.endswith(" system")
    assert not fuse.exists()
    assert pickle.loads(content)["state"] == 0  # the real reader runs it
    assert fuse.exists()


def test_plain_data_is_read_as_it_was_written():
    shared = [1, 2]
    value = {"a": (1, -2.5, "text", None, True), "b": shared, "c": shared, "d": {"e": 1 << 70}}
    for protocol in range(2, 6):
        assert read_pickle(pickle.dumps(value, protocol)) == value


def test_a_pickle_cut_off_anywhere_is_an_error_of_one_kind():
    content = pickle.dumps({"module": {"weight": pathlib.PurePath("x"), "n": list(range(50))}}, 4)
    for length in range(len(content)):
        with pytest.raises(PickleError):
            read_pickle(content[:length])


def test_damaged_bytes_end_in_an_error_or_in_data_never_in_anything_else():
    content = pickle.dumps({"a": [1, (2, "three")], "b": {"c": 4.5}}, 2)
    for position in range(len(content)):
        for byte in (0, 40, 82, 98, 255):
            try:
                read_pickle(content[:position] + bytes([byte]) + content[position + 1 :])
            except PickleError:
                continue


def test_tensors_are_known_by_shape_and_storage_without_loading_them(tmp_path):
    path = tmp_path / "shard.pt"
    write_torch_file(path, {"module": {"a": Shape((3, 5)), "b": Shape((0,))}})

    content, sizes = read_torch_pickle(path)

    tensors = dict(list_tensors(content))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"a": (3, 5), "b": (0,)}
    assert {name: tensor.num_bytes for name, tensor in tensors.items()} == {"a": 30, "b": 0}
    assert all(sizes[tensor.record] == tensor.num_bytes for tensor in tensors.values())


def test_a_walk_over_parts_that_hold_each_other_comes_to_its_end():
    value: list = []
    for _ in range(60):
        value = [value, value]
    assert list_tensors(read_pickle(pickle.dumps(value, 4))) == []
