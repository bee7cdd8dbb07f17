"""Starting and stopping processes inside a cluster's namespaces, remembered by pid files.

Called by components.py (daemons) and by the command line (`exec`). A pid file holds the pid and the start time, so that
a pid which the kernel has given to somebody else is never taken for ours. Must not signal any other process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .errors import ClusterError

NAMESPACES = ("pid", "net", "mnt")
CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWNET = 0x00020000, 0x20000000, 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def start_daemon(argv: Sequence[str], pid_file: Path, log: Path, enter: Callable[[], None]) -> int:
    """Start argv in a session of its own behind `enter`, append its output to log, and write its pid file."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            _become_daemon_parent(argv, log, enter, writer)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as answers:
        answer = answers.read()
    os.wait()
    if not answer.isdigit():
        raise ClusterError(f"{pid_file.stem}: cannot start {argv[0]}: {answer or 'its namespaces are gone'}")
    pid = int(answer)
    pid_file.write_text(f"{pid} {_read_start_time(pid)}\n")
    return pid


def _become_daemon_parent(argv: Sequence[str], log: Path, enter: Callable[[], None], writer: int) -> None:
    """Runs in the forked child: enters the namespaces, then forks, for a pid namespace takes only new children."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        enter()
    except OSError as error:
        os.write(writer, str(error).encode())
        return
    pid = os.fork()
    if pid:
        os.write(writer, str(pid).encode())
        os._exit(0)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.closerange(3, 256)
    try:
        os.execvp(argv[0], list(argv))
    except OSError as error:
        os.write(2, f"{argv[0]}: {error}\n".encode())
        os._exit(127)


def enter_namespaces(init_pid: int, kinds: Sequence[str] = NAMESPACES, env: Mapping[str, str] | None = None) -> None:
    """Join the namespaces of init_pid; the pid namespace holds for children only."""
    handles = [os.open(f"/proc/{init_pid}/ns/{kind}", os.O_RDONLY) for kind in kinds]
    for handle in handles:
        if _libc.setns(handle, 0) != 0:
            raise OSError(ctypes.get_errno(), "cannot enter the cluster's namespaces")
        os.close(handle)
    os.chdir("/")
    os.environ.update(env or {})


def create_namespaces() -> None:
    if _libc.unshare(CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "cannot create namespaces (root is needed)")


def run_inside(init_pid: int, argv: Sequence[str]) -> int:
    """Run a command in the foreground inside the namespaces and return its exit code."""
    child = os.fork()
    if child == 0:
        try:
            enter_namespaces(init_pid)
            code = os.spawnvp(os.P_WAIT, argv[0], list(argv))
        except OSError as error:
            os.write(2, f"{error}\n".encode())
            code = 127
        os._exit(code if code >= 0 else 128 - code)
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, status = os.waitpid(child, 0)
    signal.signal(signal.SIGINT, previous)
    return os.waitstatus_to_exitcode(status)


def read_pid(pid_file: Path) -> int | None:
    """The pid that the file names if that very process still runs."""
    try:
        pid, started = pid_file.read_text().split()
        return int(pid) if _read_start_time(int(pid)) == started else None
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None


def stop_process(pid_file: Path, grace_seconds: float = 10.0, stop_signal: int = signal.SIGTERM) -> None:
    """End the process that the pid file names, by force once the grace is over, and remove the file."""
    for attempt_signal, patience in ((stop_signal, grace_seconds), (signal.SIGKILL, 10.0)):
        pid = read_pid(pid_file)
        if pid is None:
            break
        os.kill(pid, attempt_signal)
        wait_until(lambda: read_pid(pid_file) is None, patience)
    pid_file.unlink(missing_ok=True)


def wait_until(condition: Callable[[], bool], patience_seconds: float, pause_seconds: float = 0.05) -> bool:
    deadline = time.monotonic() + patience_seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_seconds)
    return True


def _read_start_time(pid: int) -> str:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    if fields[0] in ("Z", "X"):
        raise ProcessLookupError(pid)
    return fields[19]
