"""Hosts on one machine: Linux network namespaces on a bridge, every link limited by a token bucket. Needs root."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SUBNET, _PORT = "10.77.0", 29511


def _sh(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@contextmanager
def hosts(number: int, rate_mbit: int | None) -> Iterator[list[str]]:
    """Names of `number` namespaces; each link carries `rate_mbit` in each direction (None: no limit). Removed at the end."""
    mark = f"bf{os.getpid() % 100_000}"  # several runs may go on at once; names of interfaces have 15 characters
    bridge, names = f"{mark}b", [f"{mark}h{i}" for i in range(number)]
    try:
        _sh("ip", "link", "add", bridge, "type", "bridge")
        _sh("ip", "link", "set", bridge, "up")
        for index, name in enumerate(names):
            outside = f"{mark}p{index}"
            _sh("ip", "netns", "add", name)
            _sh("ip", "link", "add", name, "type", "veth", "peer", "name", outside)
            _sh("ip", "link", "set", name, "netns", name)
            _sh("ip", "link", "set", outside, "master", bridge, "up")
            _sh("ip", "-n", name, "addr", "add", f"{_SUBNET}.{index + 1}/24", "dev", name)
            _sh("ip", "-n", name, "link", "set", "lo", "up")
            _sh("ip", "-n", name, "link", "set", name, "up")
            # A window that collapses in every pause, or a sender that paces itself, would be measured instead of the link.
            for setting in ("tcp_slow_start_after_idle=0", "tcp_congestion_control=reno"):
                _sh("ip", "netns", "exec", name, "sysctl", "-qw", f"net.ipv4.{setting}")
            if rate_mbit:
                shape = ("root", "tbf", "rate", f"{rate_mbit}mbit", "burst", "128kb", "latency", "50ms")
                _sh("tc", "-n", name, "qdisc", "replace", "dev", name, *shape)
                _sh("tc", "qdisc", "replace", "dev", outside, *shape)
        yield names
    finally:
        for index, name in enumerate(names):
            subprocess.run(["ip", "link", "del", f"{mark}p{index}"], capture_output=True)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)


def start_on(names: list[str], command: list[str], port: int = _PORT, **variables: str) -> list[subprocess.Popen[str]]:
    """Start a program once on every host, as the only rank there; both of its outputs go to `stdout` as text.

    Args:
        variables: of the environment, beside those that say which rank it is.
    """
    processes = []
    for rank, name in enumerate(names):
        environment = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": name,
            "MASTER_ADDR": f"{_SUBNET}.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(len(names)),
            "LOCAL_WORLD_SIZE": "1",
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    return processes


def run_hosts(number: int, rate_mbit: int | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Start the overlap benchmark with `--worker SETTINGS` on every host; the JSON object that rank 0 prints last.

    Raises:
        RuntimeError: a worker ended with an error; its last line.
        subprocess.CalledProcessError: the hosts could not be made.
    """
    command = [sys.executable, "-m", "scripts.benchmarks.overlap", "--worker", json.dumps(settings)]
    with hosts(number, rate_mbit) as names:
        processes = start_on(names, command)
        try:
            outputs = [process.communicate(timeout=3600)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(output.strip().splitlines()[-1] if output.strip() else f"exit {process.returncode}")
    return json.loads(next(line for line in reversed(outputs[0].splitlines()) if line.startswith("{")))
