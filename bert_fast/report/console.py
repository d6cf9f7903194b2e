"""What a person sees in the terminal: one progress line while a run goes, a table at its end."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def seconds_text(seconds: float) -> str:
    """1:02:03, or 2:03."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class ProgressLine:
    """Rewrites one line on a terminal; writes plain lines, fewer of them, into a file or pipe."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._terminal = sys.stdout.isatty()
        self._open = False
        self._calls = 0

    def update(
        self,
        step: int,
        samples: int,
        rate: float,
        loss: float,
        accuracy: float | None,
        target: float | None,
        remaining: float,
    ) -> None:
        """Step, samples, samples/s, loss, last accuracy of the target, time left at the most."""
        if not self._enabled:
            return
        self._calls += 1
        goal = "" if target is None else f"/{target:.3f}"
        shown = "" if accuracy is None else f" | accuracy {accuracy:.4f}{goal}"
        text = (
            f"step {step:,} | {samples:,} samples | {rate:,.0f} samples/s | loss {loss:.4f}{shown} | "
            f"at most {seconds_text(remaining)} left"
        )
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", flush=True)
            self._open = True
        elif self._calls % 10 == 1:
            print(text, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._enabled:
            self.done()
            print(text, flush=True)

    def done(self) -> None:
        """End the rewritten line."""
        if self._open:
            print(flush=True)
            self._open = False


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Two columns: what and how much. Brackets in them are text, not rich's markup."""
    table = Table(title=Text(title, style="table.title"), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    Console(soft_wrap=False).print(table)


def run_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the end-of-run table from a `metrics.json` record."""
    metrics, split = record["metrics"], record["time_split_s"]
    total = max(1e-9, metrics["time_to_train_s"])
    verdict = record["compliance"]
    return [
        ("time to train", f"{metrics['time_to_train_s']:.1f} s ({record['status']})"),
        ("target", _target_text(record)),
        *_shared_rows(record.get("shared_text")),
        ("samples", f"{metrics['samples_to_target']:,} in {metrics['steps']:,} steps"),
        ("throughput", f"{metrics['samples_per_s']:,.0f} samples/s, {metrics['tokens_per_s']:,.0f} real tokens/s"),
        ("model-FLOPs utilisation", _mfu_text(metrics)),
        ("imbalance (planned)", f"{metrics['imbalance_mean']:.4f} max/mean cost over ranks"),
        ("imbalance (measured)", f"{metrics['compute_imbalance']:.3f} max/mean compute time over ranks"),
        ("exposed communication", f"{1e3 * metrics['exposed_communication_s']:.2f} ms a step"),
        ("start-up", _start_text(record)),
        ("time split", ", ".join(f"{name} {100 * value / total:.1f} %" for name, value in split.items())),
        ("peak memory", _memory_text(record["peak_memory"])),
        *_energy_rows(record.get("energy")),
        ("MLPerf compliance", verdict["summary"]),
    ]


def _shared_rows(shared: list[int] | None) -> list[tuple[str, str]]:
    """A row if the run was evaluated on text that it was trained on."""
    if not shared:
        return []
    return [("evaluated on", f"TRAINING TEXT: {shared[0]:,} of {shared[1]:,} evaluation samples that were compared")]


def _energy_rows(energy: dict[str, Any] | None) -> list[tuple[str, str]]:
    """A row if anything was metered."""
    if not energy or energy.get("kwh") is None:
        return []
    text = f"{energy['kwh']:.4g} kWh ({energy['source']})"
    if energy.get("money") is not None:
        text += f", costs {energy['money']:.4g}"
    if energy.get("kg_co2e") is not None:
        text += f", {energy['kg_co2e']:.4g} kg CO2e"
    return [("energy", text)]


def _target_text(record: dict[str, Any]) -> str:
    metrics = record["metrics"]
    if record["target_accuracy"] is None:
        return "none was set"
    accuracy = metrics.get("final_accuracy")
    reached = "reached" if metrics["target_reached"] else "NOT reached"
    shown = "was never measured" if accuracy is None else f"{accuracy:.4f}"
    return f"{reached}: masked-LM accuracy {shown} of {record['target_accuracy']:.4f}"


def _start_text(record: dict[str, Any]) -> str:
    first = record["metrics"].get("first_step_s")
    then = "no step was needed" if first is None else f"then {first:.2f} s to the first step"
    return f"{record['init_s']:.1f} s to run_start, {then}"


def _mfu_text(metrics: dict[str, Any]) -> str:
    if not metrics.get("mfu"):
        return "not measured"
    return f"{100 * metrics['mfu']:.1f} % of a matmul ceiling of {metrics['matmul_peak_tflops']:.2f} TFLOP/s"


def _memory_text(memory: dict[str, float]) -> str:
    device = f", {memory['device_mib']:,.0f} MiB on the device" if memory["device_mib"] else ""
    return f"{memory['host_mib']:,.0f} MiB resident{device} (largest rank)"
