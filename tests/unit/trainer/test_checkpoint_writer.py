"""The process that writes a rank's files, and the commit that makes the files of all ranks a checkpoint."""

import hashlib
import os
import pathlib
import signal

import pytest

from finetune_contract.reports import Reason
from finetune_trainer.checkpoints.attempt import Fence
from finetune_trainer.checkpoints.commit import CommitPlan, Part, Shelf, read_part, write_part
from finetune_trainer.checkpoints.files import PAGE, DirectFile, round_up
from finetune_trainer.checkpoints.layout import MANIFEST, checkpoint_name
from finetune_trainer.checkpoints.manifest import FileEntry, Manifest, read_manifest, verify_checkpoint
from finetune_trainer.checkpoints.resume import choose_resume, observe_checkpoints
from finetune_trainer.checkpoints.retention import Limits
from finetune_trainer.checkpoints.writer import Commit, Extent, Seal, Write, Writer
from tests.support.waiting import eventually

CONTENT = {"global_step5/a.pt": os.urandom(3 * PAGE + 17), "global_step5/b.pt": os.urandom(PAGE), "empty.json": b""}


class Rank:
    """A rank that saves bytes; its writer is a real process."""

    def __init__(self, root: pathlib.Path, rank: int = 0, world_size: int = 1, attempt: int = 1) -> None:
        self.root, self.rank, self.world_size, self.attempt = root, rank, world_size, attempt
        self.fence = Fence(root / "attempt.json", attempt)
        self.writer = Writer.start()

    def write(self, step, content, is_last=True):
        """Order files written that all fit into the buffer."""
        memory = self.writer.map_buffer(sum(round_up(len(data)) for data in content.values()))
        extents, used = [], 0
        for name, data in content.items():
            memory[used : used + len(data)] = data
            extents.append(Extent(name, used, len(data), is_last))
            used += round_up(len(data))
        self.writer.submit(Write(self.folder(step), self.fence, len(memory), tuple(extents)))

    def seal(self, step):
        self.writer.submit(Seal(self.folder(step), self.rank, self.attempt))

    def commit(self, step):
        manifest = Manifest(step, self.world_size, 3, "bf16", self.attempt, created_at="", files={})
        shelf = Shelf(self.root, self.fence, Limits(3, 0, "min"), "eval_loss")
        self.writer.submit(Commit(CommitPlan(shelf, manifest)))

    def save(self, step, content=None):
        """Save a checkpoint of one rank, and wait for it."""
        self.write(step, content or CONTENT)
        self.seal(step)
        self.commit(step)
        self.writer.wait()

    def folder(self, step):
        return self.root / checkpoint_name(step)


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a rank."""
    ranks = []

    def begin(**facts):
        ranks.append(Rank(tmp_path, **facts))
        return ranks[-1]

    yield begin
    for rank in ranks:
        rank.writer.stop()


def test_a_save_is_a_checkpoint_with_the_very_bytes_and_their_digests(start):
    rank = start()
    rank.save(5)

    folder = rank.folder(5)
    assert rank.writer.failure is None
    assert verify_checkpoint(folder, full=True) == []
    assert {name: (folder / name).read_bytes() for name in CONTENT} == CONTENT
    assert read_manifest(folder).files == {
        name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in CONTENT.items()
    }
    # The ranks' notes are gone: what lies there is what the manifest tells.
    assert {path.name for path in folder.iterdir()} == {MANIFEST, "global_step5", "empty.json"}
    assert (rank.writer.answer.kept, rank.writer.answer.num_bytes) == ([5], sum(map(len, CONTENT.values())))


def test_a_file_larger_than_the_buffer_comes_in_several_orders(start):
    rank, data = start(), os.urandom(7 * PAGE + 5)
    for at in range(0, len(data), 2 * PAGE):
        piece = data[at : at + 2 * PAGE]
        rank.write(5, {"global_step5/a.pt": piece}, is_last=at + 2 * PAGE >= len(data))
        rank.writer.wait()
    rank.seal(5)
    rank.commit(5)
    rank.writer.wait()

    assert (rank.folder(5) / "global_step5/a.pt").read_bytes() == data
    assert verify_checkpoint(rank.folder(5), full=True) == []


def test_pieces_longer_than_one_write_are_hashed_in_order(tmp_path):
    data = os.urandom(2 * (8 << 20) + 3 * PAGE)
    buffer = bytearray(data) + bytearray(PAGE)
    file = DirectFile(tmp_path / "a")
    file.append(memoryview(buffer), 0, len(data) - 100)

    assert file.seal() == FileEntry(len(data) - 100, hashlib.sha256(data[:-100]).hexdigest())
    assert (tmp_path / "a").read_bytes() == data[:-100]


def test_a_writer_killed_in_the_middle_of_a_file_costs_that_save_only(start):
    rank = start()
    rank.save(3)
    rank.write(5, {"global_step5/a.pt": CONTENT["global_step5/a.pt"][: 2 * PAGE]}, is_last=False)
    rank.writer.wait()
    assert (rank.folder(5) / "global_step5/a.pt").stat().st_size == 2 * PAGE
    os.kill(rank.writer.pid, signal.SIGKILL)
    rank.seal(5)
    rank.commit(5)
    rank.writer.wait()

    assert rank.writer.failure.reason is Reason.KILLED
    assert "the process that writes checkpoints was ended by SIGKILL" in rank.writer.failure.message
    assert "resources.memory" in rank.writer.failure.hint
    assert rank.writer.num_outstanding == 0
    chosen = choose_resume(observe_checkpoints(rank.root))
    assert chosen.step == 3

    # The attempt after it writes the same step over what was left.
    again = start(attempt=2)
    again.save(5)
    assert again.writer.failure is None
    assert verify_checkpoint(again.folder(5), full=True) == []
    assert again.writer.answer.kept == [3, 5]


def test_after_a_write_that_failed_nothing_is_sealed_or_committed(start):
    rank = start()
    rank.root.joinpath(checkpoint_name(5)).mkdir()
    (rank.folder(5) / "global_step5").write_text("a file where the folder should be")
    rank.save(5)

    assert "checkpoint-5 could not be written" in rank.writer.failure.message
    assert not (rank.folder(5) / MANIFEST).exists()
    assert read_part(rank.folder(5), 0, 1) is None


def test_a_writer_of_an_older_attempt_touches_nothing(start):
    older, newer = start(), start(attempt=2)
    newer.save(5)
    newer.fence.attempt_file.write_text('{"attempt": 2}')
    older.save(5, {"global_step5/a.pt": b"other"})

    assert older.writer.failure.reason is Reason.FENCED
    assert verify_checkpoint(newer.folder(5), full=True) == []
    assert read_manifest(newer.folder(5)).attempt == 2


def test_the_commit_waits_for_the_last_rank(start):
    first, second = start(world_size=2), start(rank=1, world_size=2)
    first.write(5, {"latest": b"global_step5", "global_step5/0.pt": b"zero"})
    first.seal(5)
    first.commit(5)
    first.writer.wait(num_outstanding=1)
    second.write(5, {"global_step5/1.pt": b"one"})
    second.writer.wait()
    first.writer.poll()
    assert (first.writer.num_outstanding, (first.folder(5) / MANIFEST).exists()) == (1, False)

    second.seal(5)
    first.writer.wait()

    assert first.writer.failure is None
    assert sorted(read_manifest(first.folder(5)).files) == ["global_step5/0.pt", "global_step5/1.pt", "latest"]
    assert verify_checkpoint(first.folder(5), full=True) == []


def test_a_note_of_another_attempt_or_half_a_note_does_not_count(tmp_path):
    part = Part(1, 4, {"a": FileEntry(3, "00")})
    write_part(tmp_path, part)
    note = next(tmp_path.iterdir())

    assert read_part(tmp_path, 1, 4) == part
    assert read_part(tmp_path, 1, 5) is None
    assert read_part(tmp_path, 0, 4) is None
    for length in range(len(note.read_text())):
        whole = note.read_text()
        note.write_text(whole[:length])
        assert read_part(tmp_path, 1, 4) is None
        note.write_text(whole)


def test_a_writer_ends_with_its_rank_whatever_it_is_at(tmp_path):
    reader, answer = os.pipe()
    rank = os.fork()
    if rank == 0:
        # It waits for a second rank that never comes.
        saver = Rank(tmp_path, world_size=2)
        saver.write(5, CONTENT)
        saver.seal(5)
        saver.commit(5)
        saver.writer.wait(num_outstanding=1)
        os.write(answer, str(saver.writer.pid).encode())
        signal.pause()
    writer = int(os.read(reader, 20))
    os.kill(rank, signal.SIGKILL)
    os.waitpid(rank, 0)

    eventually(lambda: not _is_running(writer), within=20, every=0.01, otherwise=f"writer {writer} outlives its rank")


def _is_running(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
