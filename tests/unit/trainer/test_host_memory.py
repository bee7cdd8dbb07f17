"""What is read of control groups of version 2 and 1, as a container and a host see them."""

import pytest

from finetune_trainer.training.host_memory import HostMemory, suggest_memory


def _make(tmp_path, own, files):
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return HostMemory(tmp_path / "cgroup", tmp_path / "own")


EVENTS = "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n"


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/\n", {"memory.events": EVENTS, "memory.max": "1073741824\n"}),
        ("0::/kubepods/pod1\n", {"kubepods/pod1/memory.events": EVENTS, "kubepods/pod1/memory.max": "1073741824\n"}),
        # A container that sees the host's path, with its own group at the top.
        ("0::/kubepods/pod1\n", {"memory.events": EVENTS, "memory.max": "1073741824\n"}),
        (
            "12:cpu:/x\n4:memory:/docker/abc\n0::/\n",
            {
                "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
                "memory/memory.limit_in_bytes": "1073741824\n",
            },
        ),
    ],
)
def test_kills_and_limit_are_read(tmp_path, own, files):
    memory = _make(tmp_path, own, files)
    assert (memory.count_kills(), memory.read_limit()) == (2, 2**30)


def test_no_limit_is_none(tmp_path):
    assert _make(tmp_path, "0::/\n", {"memory.max": "max\n"}).read_limit() == 0


def test_a_limit_of_version_1_that_means_none_is_none(tmp_path):
    files = {"memory/memory.limit_in_bytes": "9223372036854771712\n"}
    assert _make(tmp_path, "4:memory:/\n", files).read_limit() == 0


def test_what_cannot_be_read_is_unknown(tmp_path):
    memory = HostMemory(tmp_path, tmp_path / "absent")
    assert (memory.count_kills(), memory.read_limit()) == (None, 0)


def test_half_as_much_again_is_asked_for():
    assert suggest_memory(64 * 2**30) == "96Gi"
    assert suggest_memory(1) == "1Gi"
