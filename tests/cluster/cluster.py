"""Command line of the embedded cluster; see kube/README.md for how it works. Called by make, the demo and tests.

Progress goes to stderr; stdout carries only the answer (JSON of `status`, a path), so that scripts can read it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable

from embedded import lifecycle, tools
from embedded.components import log_file
from embedded.errors import ClusterError
from embedded.layout import Cluster, open_cluster
from embedded.packages import install_missing_packages
from embedded.processes import run_inside


def main() -> int:
    # Programs of the system administrator's are not on every root's PATH.
    os.environ["PATH"] = f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/local/sbin:/usr/sbin:/sbin"
    arguments = _build_parser().parse_args()
    try:
        code: int = arguments.run(arguments) or 0
        return code
    except ClusterError as error:
        print(f"cluster: error: {error}", file=sys.stderr)
        return 1


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cluster.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        if run not in (_run_packages, _run_tools, _run_build, _run_list):
            command.add_argument("--name", default="default", help="which cluster (default: %(default)s)")
        return command

    add("packages", _run_packages, "install the Debian packages that are missing")
    add("tools", _run_tools, "fetch kubectl and Helm; prints their folder")
    add("build", _run_build, "compile the Go programs that are not cached; prints their paths")
    add("runtime-up", _run_runtime_up, "start only namespaces, uplink and containerd; prints status")
    up = add("up", _run_up, "start the cluster, or repair it; prints status")
    up.add_argument(
        "--control-plane-only", action="store_true", help="etcd, API server and controllers: no node, no pods"
    )
    down = add("down", _run_down, "end the cluster; its images stay")
    down.add_argument("--purge", action="store_true", help="remove its images too")
    add("status", _run_status, "print what runs and how to reach it, as JSON")
    add("kubeconfig", _run_kubeconfig, "print the path of the kubeconfig")
    add("list", _run_list, "print the names of the clusters that exist, up or down")
    start = add("start", _run_start, "start one component and wait until it is ready")
    start.add_argument("component")
    stop = add("stop", _run_stop, "stop one component")
    stop.add_argument("component")
    stop.add_argument("--force", action="store_true", help="kill it without letting it finish")
    logs = add("logs", _run_logs, "print the log of one component")
    logs.add_argument("component")
    inside = add("exec", _run_exec, "run a command inside the cluster's namespaces")
    inside.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND ARGUMENTS")
    return parser


def _open(arguments: argparse.Namespace) -> Cluster:
    return open_cluster(arguments.name)


def _print_status(cluster: Cluster) -> None:
    print(json.dumps(lifecycle.read_status(cluster), indent=2))


def _run_packages(_: argparse.Namespace) -> None:
    install_missing_packages()


def _run_tools(_: argparse.Namespace) -> None:
    print(tools.install_kubectl_and_helm())


def _run_build(_: argparse.Namespace) -> None:
    for program in (tools.PAUSE, tools.KUBE, tools.S3):
        print(tools.build_program(program))


def _run_runtime_up(arguments: argparse.Namespace) -> None:
    cluster = _open(arguments)
    lifecycle.bring_up(cluster, "runtime")
    _print_status(cluster)


def _run_up(arguments: argparse.Namespace) -> None:
    cluster = _open(arguments)
    lifecycle.bring_up(cluster, "api" if arguments.control_plane_only else "node")
    _print_status(cluster)


def _run_down(arguments: argparse.Namespace) -> None:
    if arguments.name in lifecycle.list_cluster_names():
        lifecycle.take_down(_open(arguments), arguments.purge)


def _run_status(arguments: argparse.Namespace) -> None:
    _print_status(_open(arguments))


def _run_kubeconfig(arguments: argparse.Namespace) -> None:
    print(_open(arguments).kubeconfig)


def _run_list(_: argparse.Namespace) -> None:
    for name in lifecycle.list_cluster_names():
        print(name)


def _run_start(arguments: argparse.Namespace) -> None:
    lifecycle.start_one(_open(arguments), arguments.component)


def _run_stop(arguments: argparse.Namespace) -> None:
    lifecycle.stop_component(_open(arguments), arguments.component, arguments.force)


def _run_logs(arguments: argparse.Namespace) -> None:
    log = log_file(_open(arguments), arguments.component)
    if not log.exists():
        raise ClusterError(f"no log {log}: components with one: {sorted(file.stem for file in log.parent.glob('*'))}")
    print(log.read_text(errors="replace"), end="")


def _run_exec(arguments: argparse.Namespace) -> int:
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise ClusterError("exec: name a command after --")
    return run_inside(lifecycle.read_running(_open(arguments)), command)


if __name__ == "__main__":
    sys.exit(main())
