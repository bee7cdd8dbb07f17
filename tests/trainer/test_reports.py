"""What a training pod tells while it runs, and when its volume is full."""

import datetime as dt
import http.server
import json
import os
import pathlib
import socket
import subprocess
import urllib.request

import pytest

from finetune_contract.reports import ExitCode, Metric, ProgressReport, Reason
from finetune_trainer.checkpoints.commit import Shelf
from tests.support.training_runs import kill_group
from tests.support.waiting import eventually


@pytest.fixture
def posts(tmp_path):
    """A progress server in a process of its own (threads here would make forking unsafe): its URL and its record."""
    record = tmp_path / "posts.jsonl"
    record.touch()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    pid = os.fork()
    if pid == 0:
        try:
            _record_posts(listener, record)
        finally:
            os._exit(0)
    port = listener.getsockname()[1]
    listener.close()
    yield f"http://127.0.0.1:{port}/status", record
    os.kill(pid, 9)
    os.waitpid(pid, 0)


def _record_posts(listener, record):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            token = self.headers.get("authorization", "")
            with record.open("a") as file:
                file.write(json.dumps({"token": token, "body": json.loads(body)}) + "\n")
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server.socket = listener
    server.serve_forever()


def test_progress_is_posted_once_per_report_with_step_loss_and_checkpoints(make_run, posts, monkeypatch, tmp_path):
    url, record = posts
    (tmp_path / "token").write_text("secret-token")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", url)
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(tmp_path / "token"))
    run = make_run("llama", "workspace", "checkpoint.every_steps=4", "training.logging_steps=1")

    run.train("training.max_steps=8")

    entries = [json.loads(line) for line in record.read_text().splitlines()]
    reports = [ProgressReport.from_body(entry["body"]) for entry in entries]
    last = reports[-1]
    assert {entry["token"] for entry in entries} == {"Bearer secret-token"}
    assert last.percentage == 100
    assert last.metrics[Metric.STEP] == last.metrics[Metric.TOTAL_STEPS] == 8
    assert last.metrics[Metric.LATEST_CHECKPOINT] == 8
    assert last.metrics[Metric.LOSS] > 0
    assert last.metrics[Metric.TOKENS_PER_SECOND] > 0
    assert last.metrics[Metric.CHECKPOINT_BYTES] == run.manifests()[8].num_bytes
    committed = dt.datetime.fromisoformat(run.manifests()[8].created_at)
    assert last.metrics[Metric.CHECKPOINT_TIME] == committed.timestamp()
    assert last.metrics[Metric.SAVE_SECONDS] >= last.metrics[Metric.CHECKPOINT_SECONDS] > 0
    productive = [report.metrics[Metric.PRODUCTIVE_SECONDS] for report in reports]
    assert productive == sorted(productive)
    assert productive[0] == 0 < productive[-1]
    # Transformers would post to the same URL by itself; its posts have other metrics beside the step.
    assert not any("mean_token_accuracy" in report.metrics for report in reports)


def test_each_logged_step_has_a_line_in_the_metrics_file(make_run):
    run = make_run("llama", "workspace", "training.logging_steps=2", "checkpoint.every_steps=4")
    first = run.train("training.max_steps=4")
    second = run.train("training.max_steps=6")

    # The time in steps is saved with a checkpoint, and goes on from there.
    assert second["productive_seconds"] > first["productive_seconds"] > 0
    lines = [json.loads(line) for line in (run.workspace.reports / "metrics.jsonl").read_text().splitlines()]

    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 6]
    assert [line["step"] for line in lines if Metric.LATEST_CHECKPOINT in line] == [4, 6]


def test_prometheus_can_scrape_a_training_pod(make_run, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("FINETUNE_METRICS_PORT", str(port))
    run = make_run("llama", "workspace", "training.logging_steps=1", "checkpoint.every_steps=2")
    pid = run.start("training.max_steps=100000")
    try:
        run.wait_for_checkpoint(2)
        text = eventually(lambda: _scrape(port), within=30)
    finally:
        kill_group(pid)

    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["finetune_training_current_step"]) >= 2
    assert float(values["finetune_training_total_steps"]) == 100000
    assert float(values["finetune_training_loss"]) > 0
    assert float(values["finetune_training_checkpoint_seconds"]) > 0
    assert float(values["finetune_training_checkpoint_bytes"]) > 0
    assert float(values["finetune_training_productive_seconds"]) > 0


def _scrape(port):
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    except OSError:
        return None
    return text if "finetune_training_latest_checkpoint_step 0" not in text else None


@pytest.fixture
def small_volume(tmp_path):
    """A volume of 16 MiB, made for one test and removed after it."""
    folder = tmp_path / "volume"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], check=False)
    assert mounted.returncode == 0, "this rung mounts a small volume: run it as root"
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_volume_ends_the_run_with_the_numbers_and_the_last_checkpoint_whole(make_run, small_volume):
    run = make_run("llama", "unused", "checkpoint.every_steps=2", "checkpoint.keep_latest=1")
    run.root = small_volume
    run.train("training.max_steps=2")
    _fill(small_volume, leaving=1 << 20)

    code = run.call("train", "training.max_steps=8")

    report = run.report("train")
    assert code == ExitCode.STORAGE_FULL
    assert report["reason"] == Reason.STORAGE_FULL
    assert "the next checkpoint needs 1." in report["message"]
    assert "spec.workspace.size" in report["hint"]
    assert list(run.manifests()) == [2]

    # After it has grown, the job goes on from there.
    (small_volume / "ballast").unlink()
    assert run.train("training.max_steps=8")["resumed_from_step"] == 2


def test_a_volume_that_fills_up_during_a_save_costs_that_save_only(make_run, small_volume, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_TERMINATION_LOG", str(tmp_path / "termination"))
    run = make_run("llama", "unused", "checkpoint.every_steps=2", "checkpoint.keep_latest=1")
    run.root = small_volume
    run.train("training.max_steps=2")
    check = Shelf.make_room

    def check_and_fill(shelf, *arguments):
        check(shelf, *arguments)
        _fill(small_volume, leaving=0)

    with monkeypatch.context() as patch:
        # Someone else takes the room that the check has found; the ranks are forked with this in place.
        patch.setattr(Shelf, "make_room", check_and_fill)
        code = run.call("train", "training.max_steps=8")

    report = json.loads((tmp_path / "termination").read_text())
    assert (code, report["reason"]) == (ExitCode.STORAGE_FULL, Reason.STORAGE_FULL), report
    assert "the workspace filled up while checkpoint-4 was written" in report["message"]
    assert not (small_volume / "checkpoints" / "checkpoint-4").exists()
    assert list(run.manifests()) == [2]
    (small_volume / "ballast").unlink()
    assert run.train("training.max_steps=4")["resumed_from_step"] == 2


def _fill(volume: pathlib.Path, leaving: int) -> None:
    free = os.statvfs(volume)
    with (volume / "ballast").open("wb") as file:
        file.write(b"\0" * max(0, free.f_bavail * free.f_frsize - leaving))
