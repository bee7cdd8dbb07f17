"""Process 1 of a cluster: owns its network, mount and process namespaces, and reaps what dies in them.

Started by namespaces.py as `python3 init.py RUN_FOLDER`, already inside the new namespaces. Everything else of the
cluster runs in them, so that killing this process ends every process, mount and interface of the cluster at once,
whatever state it is in. It must hold nothing worth saving.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

# kubelet insists on these values and would write them for the whole machine; it finds them already there instead.
KERNEL_SETTINGS = {
    "/proc/sys/vm/overcommit_memory": "1",
    "/proc/sys/kernel/panic": "10",
    "/proc/sys/kernel/panic_on_oops": "1",
    "/proc/sys/kernel/keys/root_maxkeys": "1000000",
    "/proc/sys/kernel/keys/root_maxbytes": "25000000",
}
PRIVATE_FOLDERS = ("/run", "/var/log", "/var/lib/cni", "/var/lib/kubelet")


def main() -> None:
    run_folder = Path(sys.argv[1])
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    mount_private_views(run_folder)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    (run_folder / "init.ready").touch()
    while True:
        signal.sigwait({signal.SIGCHLD})
        reap_children()


def mount_private_views(run_folder: Path) -> None:
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "proc", "proc", "/proc"], check=True)
    for folder in PRIVATE_FOLDERS:
        Path(folder).mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", folder], check=True)
    Path("/run/lock").mkdir()
    # kubelet binds pod volumes and expects the containers' mounts to follow.
    subprocess.run(["mount", "--make-rshared", "/"], check=True)
    subprocess.run(["mount", "--bind", str(run_folder / "resolv.conf"), "/etc/resolv.conf"], check=True)
    settings = run_folder / "kernel-settings"
    settings.mkdir(exist_ok=True)
    for path, value in KERNEL_SETTINGS.items():
        stand_in = settings / Path(path).name
        stand_in.write_text(value + "\n")
        subprocess.run(["mount", "--bind", str(stand_in), path], check=True)


def reap_children() -> None:
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return


if __name__ == "__main__":
    main()
