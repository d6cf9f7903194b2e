"""The pre-flight's table of nodes, on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bert_fast.run_folder import PREFLIGHT

_SHOWN = 64  # nodes; of more, those that stand out


def node_table(report: dict[str, Any]) -> None:
    """Print a row for every node, the network's speed, and one line for all that is slow."""
    console = Console(soft_wrap=True)
    nodes, slow = report["nodes"], report["slow"]
    shown = nodes
    if len(nodes) > _SHOWN:
        marked = [n for n in nodes if any(f"({n['host']})" in text for text in slow)]
        shown = (marked + [n for n in nodes if n not in marked])[:_SHOWN]
    title = f"pre-flight: {report['world_size']:,} ranks on {len(nodes):,} nodes, {report['seconds']:.1f} s"
    table = Table(title=title, title_justify="left")
    for name in ("host", "ranks", "device", "CPUs", "GiB", "TFLOP/s", "to next MB/s", "clock ms", "data"):
        table.add_column(name, justify="left" if name in ("host", "device", "data") else "right")
    for node in shown:
        table.add_row(
            Text(node["host"]),
            _ranges(node["ranks"]),
            Text(node["device"]),
            str(len(node["cpus"])),
            f"{node['memory_gib']:.0f}",
            _span(node["tflops"], "{:.2f}"),
            _span(node["link_mb_s"], "{:,.0f}"),
            _span(node["clock_ms"], "{:+.1f}"),
            Text(node["data"]["data.train"].split()[0]),
        )
    console.print(table)
    if len(shown) < len(nodes):
        console.print(f"{len(nodes) - len(shown):,} more nodes are in {PREFLIGHT}")
    network = report["network"]
    if network:
        bandwidths = [
            f"{value:.2f} GB/s bus at {name.split('_')[3]} KiB" for name, value in network.items() if "bus" in name
        ]
        console.print(f"all-reduce: {network['latency_us']:.0f} us latency, " + ", ".join(bandwidths))
    for text in slow:
        console.print(f"slow: {text}", style="bold", markup=False)
    if not slow:
        console.print("no rank stands out")


def _ranges(ranks: list[int]) -> str:
    """0-7, or 0,3."""
    if ranks == list(range(ranks[0], ranks[-1] + 1)):
        return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))


def _span(values: list[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} - {high}"
