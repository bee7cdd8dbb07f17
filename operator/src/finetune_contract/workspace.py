"""Names and paths under the workspace, the one volume that every pod of a job mounts.

The operator uses them to mount and to report paths, the trainer to read and write. Nothing here touches the disk.
"""

from __future__ import annotations

import dataclasses
import pathlib

MOUNT_PATH = "/workspace"
"""Where every pod of a job mounts the workspace."""


@dataclasses.dataclass(frozen=True)
class Workspace:
    """The folders and well-known files of one job, below `root`."""

    root: pathlib.Path = pathlib.Path(MOUNT_PATH)
    """The job's folder: the mount path in a pod, any folder outside a cluster."""

    @property
    def lock_file(self) -> pathlib.Path:
        """JSON `{"uid", "namespace", "name"}` of the job that owns this folder; another job's pods refuse to start."""
        return self.root / ".finetune-job.json"

    @property
    def base_model(self) -> pathlib.Path:
        """The downloaded base model in Hugging Face layout."""
        return self.root / "models" / "base"

    @property
    def base_model_manifest(self) -> pathlib.Path:
        """Written last by `prepare`: source, revision and digest of the base model. Without it the model is absent."""
        return self.root / "models" / "base.json"

    def evaluated_model(self, name: str) -> pathlib.Path:
        """A further model that was downloaded to be scored beside the job's own."""
        return self.root / "models" / "evaluated" / name

    @property
    def datasets(self) -> pathlib.Path:
        """One folder per prepared data set, named by the digest of its source rows and rules."""
        return self.root / "datasets"

    @property
    def current_dataset(self) -> pathlib.Path:
        """JSON `{"digest"}` of the prepared data set in use."""
        return self.datasets / "current.json"

    def dataset(self, digest: str) -> pathlib.Path:
        """The folder of one prepared data set: train.jsonl, holdout.jsonl, removed.jsonl, report.json, report.html."""
        return self.datasets / digest

    @property
    def checkpoints(self) -> pathlib.Path:
        """Folders `checkpoint-<step>`, `attempt.json` (the newest attempt) and `quarantine/`."""
        return self.root / "checkpoints"

    @property
    def attempt_file(self) -> pathlib.Path:
        """JSON `{"attempt"}`: the newest attempt on this workspace; an older attempt's writer stops when it sees it."""
        return self.checkpoints / "attempt.json"

    @property
    def output(self) -> pathlib.Path:
        """One folder per promoted model, named by its digest."""
        return self.root / "output"

    def promoted_model(self, digest: str) -> pathlib.Path:
        """The promoted model with this digest."""
        return self.output / digest

    def weight_diff(self, digest: str) -> pathlib.Path:
        """The difference of a promoted model from the base model."""
        return self.root / "weight-diffs" / digest

    @property
    def adapters(self) -> pathlib.Path:
        """One folder per composed adapter, named by the digest of its profile."""
        return self.root / "adapters"

    def composed_adapter(self, digest: str) -> pathlib.Path:
        """The composed adapter with this profile: PEFT's files, composition.json, measurement.json."""
        return self.adapters / digest

    @property
    def reports(self) -> pathlib.Path:
        """One JSON file per phase, `dataset-<digest>.json` and `.html`, `run-<digest>.html`, `.json` and `.md` of each
        promoted model, `scores.json`, `samples.json`, and `metrics.jsonl`, a line per logged step.
        """
        return self.root / "reports"

    @property
    def metrics_log(self) -> pathlib.Path:
        """A line of JSON per logged step, save and start of the ranks; steps done twice have two lines."""
        return self.reports / "metrics.jsonl"

    @property
    def samples(self) -> pathlib.Path:
        """What base and promoted model answer to some held-out prompts."""
        return self.reports / "samples.json"

    @property
    def mirror_state(self) -> pathlib.Path:
        """JSON `{"step", "bytes", "failures"}`: what the mirror process of the running attempt has done."""
        return self.reports / "mirror.json"
