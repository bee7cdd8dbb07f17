"""What a pod tells of vLLM when it fails, from output as the real one writes it, and what is refused before it starts.

Real runs of vLLM are in tests/vllm; here are the errors that only a GPU brings.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from finetune_contract import vllm_server
from finetune_contract.reports import ExitReport
from tests.support.waiting import eventually

FRONT_END = (
    "(APIServer pid=7) Traceback (most recent call last):\n"
    '(APIServer pid=7)   File "vllm/v1/engine/utils.py", line 1431, in wait_for_engine_startup\n'
    "(APIServer pid=7)     raise RuntimeError(\n"
    "(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
)
"""How every start ends that fails: the cause was told before."""


def tell(process, *lines):
    """Return lines as vLLM logs them when one of its processes dies."""
    return "".join(f"({process} pid=101) ERROR 11-23 23:15:05 [core.py:1510] {line}\n" for line in lines)


@pytest.fixture
def run(tmp_path):
    """Run the program as pods do, by its file alone; returns the process and the report that it left."""

    def run_program(*arguments, timeout=60):
        log = tmp_path / "termination-log"
        command = (sys.executable, "-I", vllm_server.__file__, *arguments)
        environment = {"FINETUNE_TERMINATION_LOG": str(log), "PATH": os.environ["PATH"]}
        finished = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        return finished, ExitReport.from_termination_message(log.read_text()) if log.exists() else None

    return run_program


def print_and_exit(text, code):
    """Return the command of a server that writes this and ends with that code."""
    return (
        "--",
        sys.executable,
        "-c",
        f"import os, sys; sys.stdout.write({text!r}); sys.stdout.flush(); os._exit({code})",
    )


@pytest.mark.parametrize(
    ("output", "said", "hint"),
    [
        (
            tell(
                "Worker_TP1",
                "Traceback (most recent call last):",
                "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
            )
            + tell("EngineCore", "Exception: WorkerProc initialization failed due to an exception in a process."),
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
            "inference.gpusPerReplica",
        ),
        (
            tell("EngineCore", "ValueError: No available memory for the cache blocks."),
            "ValueError: No available memory for the cache blocks.",
            "inference.gpusPerReplica",
        ),
        (
            "RuntimeError: Failed to infer device type, please set VLLM_LOGGING_LEVEL=DEBUG\n",
            "RuntimeError: Failed to infer device type, please set VLLM_LOGGING_LEVEL=DEBUG",
            "device plugin",
        ),
        (
            tell("Worker", "safetensors._safetensors_rust.SafetensorError: Error while deserializing header"),
            "SafetensorError: Error while deserializing header",
            "",
        ),
        ("\x1b[0;36m(EngineCore pid=9)\x1b[0;0m KeyError: 'lm_head'\n", "KeyError: 'lm_head'", ""),
    ],
)
def test_the_first_error_of_a_failing_start_is_reported_and_not_the_last(run, output, said, hint):
    finished, report = run(*print_and_exit(output + FRONT_END, 1))

    assert finished.returncode == 1
    assert finished.stdout.startswith(output + FRONT_END), "the log is passed on as it is"
    assert (report.reason, report.exit_code) == ("ServerFailed", 1)
    assert report.message.startswith("vLLM ended with code 1: ")
    assert report.message.endswith(said)
    assert hint in report.hint
    assert bool(report.hint) == bool(hint)


@pytest.mark.parametrize(
    ("output", "code", "message"),
    [
        ("usage: vllm serve\nvllm serve: error: unrecognized arguments: -x\n", 2, "error: unrecognized arguments: -x"),
        ("one\n\xff two\n\n", 3, "vLLM ended with code 3: \xff two"),
        ("", 1, "vLLM ended with code 1: "),
    ],
)
def test_output_without_a_cause_is_quoted_by_its_end(run, output, code, message):
    finished, report = run(*print_and_exit(output, code))
    assert finished.returncode == code
    assert report.message.endswith(message)


def test_a_server_that_ends_well_or_is_asked_to_stop_leaves_no_report(run):
    finished, report = run(*print_and_exit("bye\n", 0))
    assert (finished.returncode, finished.stdout, report) == (0, "bye\n", None)


def test_signals_are_passed_on_and_the_code_is_the_server_s(tmp_path):
    ready, log = tmp_path / "ready", tmp_path / "termination-log"
    server = (
        "import pathlib, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "signal.pause()\n"
    )
    command = (sys.executable, "-I", vllm_server.__file__, "--", sys.executable, "-c", server)
    with subprocess.Popen(command, env={"FINETUNE_TERMINATION_LOG": str(log)}, stdout=subprocess.DEVNULL) as process:
        assert eventually(ready.exists, within=30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 7
    assert not log.exists()


def test_a_killed_server_s_signal_is_in_the_code(run):
    finished, report = run("--", sys.executable, "-c", "import os; print('last'); os.kill(os.getpid(), 9)")
    assert finished.returncode == 128 + signal.SIGKILL
    assert report.exit_code == 128 + signal.SIGKILL


def write_promoted(folder, **changes):
    """Write a folder that looks like a promoted model."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"12345")
    manifest = {"digest": folder.name, "files": {"model.safetensors": {"size": 5, "sha256": "x"}}} | changes
    (folder / vllm_server.MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"123"), "model.safetensors is missing or has"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing or has"),
        (lambda folder: (folder / vllm_server.MANIFEST).write_text("{"), "finetune-model.json is missing or not whole"),
        (lambda folder: write_promoted(folder, files=[]), "finetune-model.json is missing or not whole"),
        (lambda folder: write_promoted(folder, digest="other"), "holds another model, other"),
        (lambda folder: folder.rename(folder.parent / "away"), "does not exist"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_before_the_server_starts(run, tmp_path, damage, said):
    folder = write_promoted(tmp_path / "abc123")
    started = tmp_path / "started"
    command = (f"--promoted={folder}", "--", sys.executable, "-c", f"open({str(started)!r}, 'w')")
    assert run(*command)[0].returncode == 0
    assert started.exists()
    started.unlink()

    damage(folder)
    finished, report = run(*command)

    assert finished.returncode == vllm_server.EXIT_NO_INPUT
    assert report.reason == "PromotionInvalid"
    assert str(folder) in report.message
    assert said in report.message
    assert "Promote again" in report.hint
    assert not started.exists()
