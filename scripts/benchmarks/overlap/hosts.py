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


def run_hosts(number: int, rate_mbit: int | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Start the overlap benchmark with `--worker SETTINGS` on every host; the JSON object that rank 0 prints.

    Raises:
        RuntimeError: a worker ended with an error; its last line.
        subprocess.CalledProcessError: the hosts could not be made.
    """
    with hosts(number, rate_mbit) as names:
        processes = []
        for rank, name in enumerate(names):
            variables = {
                **os.environ,
                "GLOO_SOCKET_IFNAME": name,
                "MASTER_ADDR": f"{_SUBNET}.1",
                "MASTER_PORT": str(_PORT),
                "RANK": str(rank),
                "WORLD_SIZE": str(number),
                "OMP_NUM_THREADS": "1",
            }
            module = [sys.executable, "-m", "scripts.benchmarks.overlap", "--worker", json.dumps(settings)]
            command = ["ip", "netns", "exec", name, *module]
            processes.append(
                subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        try:
            outputs = [process.communicate(timeout=3600) for process in processes]
        finally:
            for process in processes:
                process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(errors.strip().splitlines()[-1] if errors.strip() else f"exit {process.returncode}")
    return json.loads(outputs[0][0].splitlines()[-1])
