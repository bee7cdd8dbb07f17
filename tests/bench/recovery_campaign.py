"""The runs of a recovery campaign: each trainer on workspaces of its own, judged by a run without faults."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shutil
import statistics
import tempfile
from collections.abc import Iterator

from tests.bench.recovery_arms import Arm, OurTrainer, SaveEngine, StockTrainer
from tests.bench.recovery_faults import EVERY_STEPS, LAST_STEP, VARIANTS, plan_full_disks, plan_kills
from tests.bench.recovery_record import ENGINE, OURS, STOCK, Record
from tests.bench.recovery_training import Pace, Story, play
from tests.bench.results import REPOSITORY, read_commit
from tests.bench.small_volume import mount_small_volume
from tests.support.training_runs import SMALL, Run, build_llama, write_data

VOLUME_BYTES = 32 << 20
"""Room for the checkpoints that retention keeps, and some more."""

SETTINGS = (
    *SMALL,
    f"training.max_steps={LAST_STEP}",
    "training.logging_steps=1",
    f"checkpoint.every_steps={EVERY_STEPS}",
    "checkpoint.keep_latest=2",
)

ARMS: dict[str, Arm] = {OURS: OurTrainer(), STOCK: StockTrainer(), ENGINE: SaveEngine()}


@dataclasses.dataclass
class Reference:
    """What a run without faults ends with, and how long its parts take."""

    weights: dict[str, str]
    pace: Pace


class CodeChangedError(RuntimeError):
    """Runs of the same campaign would train with different code."""


class Campaign:
    """The runs of one seed; `record` says which are done. Raises CodeChangedError where a run is of no use for it."""

    def __init__(self, seed: int, record: Record, folder: pathlib.Path, import_seconds: float) -> None:
        self._seed, self._record, self._folder = seed, record, folder
        self._import_seconds = import_seconds
        self._code = _read_code_times()
        self._data, self._model = write_data(folder / "data"), build_llama(folder / "model")
        self._references: dict[tuple[str, int], Reference] = {}

    def play_kills(self, arm: str) -> Story:
        """Play the next run with kills, and record it."""
        number = self._record.choose_run(arm, "kills")
        reference = self._find_reference(arm, number)
        faults = plan_kills(self._seed, number, may_be_fresh=arm != ENGINE)
        with self._make_run(number) as run:
            story = play(ARMS[arm], run, faults, reference.pace, last_step=LAST_STEP)
        self._add(arm, "kills", number, story)
        return story

    def play_full_disks(self, arm: str) -> Story:
        """Play the next run on a volume that runs full, and record it."""
        number = self._record.choose_run(arm, "disks")
        reference = self._find_reference(arm, number)
        mount = mount_small_volume(self._folder / "volume", VOLUME_BYTES)
        with mount as volume, self._make_run(number, volume.folder) as run:
            faults = plan_full_disks(self._seed, number)
            story = play(ARMS[arm], run, faults, reference.pace, volume, last_step=LAST_STEP)
        self._add(arm, "disks", number, story)
        return story

    def _find_reference(self, arm: str, number: int) -> Reference:
        key = (arm, number % len(VARIANTS))
        if key not in self._references:
            self._references[key] = self._measure(arm, number)
        return self._references[key]

    def _measure(self, arm: str, number: int) -> Reference:
        with self._make_run(number) as run:
            story = play(ARMS[arm], run, [], Pace(), last_step=LAST_STEP)
            if not story.is_finished:
                raise RuntimeError(f"{arm}: a run without faults failed:\n{(run.root / 'trainer.log').read_text()}")
        life = story.life
        saves = [times[1] - times[0] for times in life.saves.values() if len(times) > 1]
        trained = life.last_heard_at - life.process.started_at - life.seconds_to_first_step
        pace = Pace(life.seconds_to_first_step, trained / LAST_STEP, statistics.median(saves), self._import_seconds)
        return Reference(story.weights, pace)

    @contextlib.contextmanager
    def _make_run(self, number: int, parent: pathlib.Path | None = None) -> Iterator[Run]:
        root = pathlib.Path(tempfile.mkdtemp(prefix="workspace-", dir=parent or self._folder))
        try:
            yield Run(root, self._model, self._data, (*SETTINGS, *VARIANTS[number % len(VARIANTS)]))
        finally:
            shutil.rmtree(root, ignore_errors=True)

    def _add(self, arm: str, kind: str, number: int, story: Story) -> None:
        if _read_code_times() != self._code:
            # Fresh starts import what lies there now, the forked ones what lay there when this process began.
            raise CodeChangedError("files below operator/src have changed since the campaign was begun; run it again")
        reference = self._find_reference(arm, number)
        faults = [{**hit.to_json(), "lost_intervals": hit.lost_steps / EVERY_STEPS} for hit in story.hits]
        self._record.add_run(
            arm,
            kind,
            number,
            faults,
            is_finished=story.is_finished,
            has_diverged=story.is_finished and story.weights != reference.weights,
            differing=[name for name in story.weights if story.weights[name] != reference.weights.get(name)],
            num_hands=story.num_hands,
            commit=read_commit(),
        )


def _read_code_times() -> dict[pathlib.Path, int]:
    return {path: path.stat().st_mtime_ns for path in (REPOSITORY / "operator" / "src").rglob("*.py")}
