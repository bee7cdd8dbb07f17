"""The program's shell: help without torch, exit codes, and exit reports for everything that can be raised."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from finetune_contract.parsing import RunConfigError
from finetune_contract.reports import ExitCode, Reason
from finetune_trainer import __main__ as program
from finetune_trainer.commands import prepare
from finetune_trainer.errors import StopRequested, TrainerError, as_trainer_error, redact
from tests.support.waiting import eventually


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


@pytest.mark.parametrize("command", [None, *program.COMMANDS])
def test_help_of_every_command_needs_no_torch(command):
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = sys.modules['deepspeed'] = None\n"
        "from finetune_trainer.__main__ import main\n"
        "main(sys.argv[1:])\n"
    )
    words = [word for word in (command, "--help") if word]
    ran = subprocess.run([sys.executable, "-c", code, *words], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "usage: finetune-trainer" in ran.stdout


@pytest.mark.parametrize("words", [[], ["dance"], ["prepare", "--no-such-option"], ["prepare", "--format", "csv"]])
def test_a_wrong_command_line_exits_with_usage(words, capsys):
    with pytest.raises(SystemExit) as caught:
        program.main(words)
    assert caught.value.code == ExitCode.USAGE
    assert "usage: finetune-trainer" in capsys.readouterr().err


def test_a_phase_without_settings_says_how_to_name_them(run_command):
    outcome = run_command("prepare")
    assert (outcome.code, outcome.report["reason"]) == (ExitCode.USAGE, "InvalidConfig")
    assert "--run-config" in outcome.report["hint"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ('{"version": 99}', "version"),
        ('{"version": 1, "model": {"source": "x"}, "dataset": {"sources": [], "colour": 1}}', "colour"),
    ],
)
def test_settings_of_another_version_are_refused_by_field(run_command, tmp_path, content, said):
    path = tmp_path / "settings.json"
    path.write_text(content)
    outcome = run_command("prepare", "--run-config", str(path))
    assert (outcome.code, outcome.report["reason"]) == (ExitCode.CONFIG, "InvalidConfig")
    assert said in outcome.report["message"]


@pytest.mark.parametrize(
    ("error", "reason", "code"),
    [
        (TrainerError(Reason.DATASET_EMPTY, ExitCode.DATA, "m"), Reason.DATASET_EMPTY, 65),
        (RunConfigError("x"), Reason.INVALID_CONFIG, 78),
        (OSError(errno.ENOSPC, "No space left on device", "f"), Reason.STORAGE_FULL, 73),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), Reason.STORAGE_FULL, 73),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate"), Reason.OUT_OF_MEMORY, 79),
        (StopRequested(), Reason.SUSPENDED, 75),
        (KeyError("x"), Reason.USER_CODE_ERROR, 1),
    ],
)
def test_whatever_is_raised_becomes_a_report(run_command, monkeypatch, error, reason, code):
    def fail(_args: object) -> int:
        raise error

    monkeypatch.setattr(prepare, "run", fail)
    outcome = run_command("prepare")
    assert (outcome.code, outcome.report["reason"], outcome.report["exit_code"]) == (code, reason, code)
    assert outcome.report["phase"] == "prepare"


def test_an_unforeseen_error_says_where_it_was_raised():
    try:
        {}["missing"]
    except KeyError as error:
        failure = as_trainer_error(error)
    assert failure.message.startswith("KeyError: 'missing' (test_program.py:")


def test_sigterm_ends_a_phase_with_its_own_code(tmp_path):
    """As the first process of a container a program dies of SIGTERM only if it handles it."""
    code = (
        "import sys, time\n"
        "from finetune_trainer import __main__ as program\n"
        "from finetune_trainer.commands import prepare\n"
        "def run(args):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "prepare.run = run\n"
        "sys.exit(program.main(['prepare']))\n"
    )
    variables = {**os.environ, "FINETUNE_TERMINATION_LOG": str(tmp_path / "log")}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=variables)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    eventually(lambda: process.poll() is not None, within=10, every=0.02)
    process.stdout.close()
    assert process.returncode == ExitCode.SUSPENDED
    assert json.loads((tmp_path / "log").read_text())["reason"] == "Suspended"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("token hf_abcdefgh was refused", "token *** was refused"),
        ("https://user:pass@host/x", "https://***@host/x"),
        ("GET https://h/x?X-Amz-Signature=abc&y=1 failed", "GET https://h/x?*** failed"),
        ("https://h/x?page=2", "https://h/x?page=2"),
        ("read /run/token", "read /run/token"),
        ("key short stays", "key short stays"),
    ],
)
def test_secrets_are_removed_from_what_people_read(text, clean):
    variables = {
        "FINETUNE_MODEL_HF_TOKEN": "hf_abcdefgh",
        "KUBEFLOW_TRAINER_SERVER_TOKEN": "/run/token",
        "AWS_SECRET_ACCESS_KEY": "short",
    }
    assert redact(text, variables) == clean
