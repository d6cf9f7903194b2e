"""What the terminal shows: one progress line while a run goes, a table at its end."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bert_fast.report.schema import EnergyRecord, PeakMemory, RunMetrics, RunRecord

_BARS = "▁▂▃▄▅▆▇█"


def seconds_text(seconds: float) -> str:
    """1:02:03, or 2:03."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Values as bars, means of equal parts where there are more than `width`; ? where nothing is finite."""
    parts = np.array_split(np.array(values, dtype=float), min(width, len(values))) if values else []
    means = [float(part[np.isfinite(part)].mean()) if np.isfinite(part).any() else math.nan for part in parts]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return "?" * len(means)
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join("?" if math.isnan(mean) else _BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)


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

    def log(self, text: str) -> None:
        """A line that stays."""
        if self._enabled:
            self.done()
            print(text, flush=True)

    def done(self) -> None:
        """End the rewritten line."""
        if self._open:
            print(flush=True)
            self._open = False


def share_bar(parts: Mapping[str, float], width: int = 60) -> str:
    """Parts of a whole as runs of letters, a letter for each name: its first one that no earlier name has."""
    total = sum(parts.values())
    letters: dict[str, str] = {}
    for name in parts:
        free = [c for c in name if c.isalpha() and c not in letters.values()]
        letters[name] = free[0] if free else "?"
    ends = np.rint(np.cumsum([width * value / total for value in parts.values()])).astype(int) if total else []
    runs = np.diff(ends, prepend=0)
    return "".join(letters[name] * int(run) for name, run in zip(parts, runs, strict=True)) if total else ""


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Two columns: what and how much. Brackets in them are text, not rich's markup."""
    table = Table(title=Text(title, style="table.title"), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    Console(soft_wrap=False).print(table)


def run_rows(record: RunRecord) -> list[tuple[str, str]]:
    """The rows of the table at the end of a run, and of its report's summary."""
    metrics, total = record.metrics, max(1e-9, record.metrics.time_to_train_s)
    shares = [f"{name} {100 * seconds / total:.1f} %" for name, seconds in record.time_split_s.as_json().items()]
    return [
        ("time to train", f"{metrics.time_to_train_s:.1f} s ({record.status})"),
        ("target", _target_text(record)),
        *_shared_rows(record.shared_text),
        ("samples", f"{metrics.samples_to_target:,} in {metrics.steps:,} steps"),
        ("throughput", f"{metrics.samples_per_s:,.0f} samples/s, {metrics.tokens_per_s:,.0f} real tokens/s"),
        ("model-FLOPs utilisation", _mfu_text(metrics)),
        *_virtual_rows(record.virtual_ranks),
        ("imbalance (planned)", f"{metrics.imbalance_mean:.4f} max/mean cost over ranks"),
        ("imbalance (measured)", f"{metrics.compute_imbalance:.3f} max/mean compute time over ranks"),
        ("exposed communication", f"{1e3 * metrics.exposed_communication_s:.2f} ms per step"),
        ("start-up", _start_text(record)),
        ("time split", ", ".join(shares)),
        ("peak memory", _memory_text(record.peak_memory)),
        *_energy_rows(record.energy),
        ("MLPerf compliance", record.compliance.summary),
    ]


def _shared_rows(shared: tuple[int, int] | None) -> list[tuple[str, str]]:
    """A row if the run was evaluated on text that it was trained on."""
    if shared is None:
        return []
    return [("evaluated on", f"TRAINING TEXT: {shared[0]:,} of {shared[1]:,} evaluation samples that were compared")]


def _virtual_rows(count: int) -> list[tuple[str, str]]:
    """A row if ranks computed the shares of others."""
    if count == 1:
        return []
    return [
        ("virtual ranks", f"{count:,} on every real rank, one after the other: speed is not that of as many machines")
    ]


def _energy_rows(energy: EnergyRecord) -> list[tuple[str, str]]:
    """A row if anything was metered."""
    if energy.kwh is None:
        return []
    text = f"{energy.kwh:.4g} kWh ({energy.source})"
    if energy.money is not None:
        text += f", costs {energy.money:.4g}"
    if energy.kg_co2e is not None:
        text += f", {energy.kg_co2e:.4g} kg CO2e"
    return [("energy", text)]


def _target_text(record: RunRecord) -> str:
    if record.target_accuracy is None:
        return "none was set"
    accuracy = record.metrics.final_accuracy
    reached = "reached" if record.metrics.target_reached else "NOT reached"
    measured = "was never measured" if accuracy is None else f"{accuracy:.4f}"
    return f"{reached}: masked-LM accuracy {measured} of {record.target_accuracy:.4f}"


def _start_text(record: RunRecord) -> str:
    first = record.metrics.first_step_s
    then = "no step was needed" if first is None else f"then {first:.2f} s to the first step"
    return f"{record.init_s:.1f} s to run_start, {then}"


def _mfu_text(metrics: RunMetrics) -> str:
    if metrics.mfu is None:
        return "not measured"
    return f"{100 * metrics.mfu:.1f} % of a measured matmul peak of {metrics.matmul_peak_tflops:.2f} TFLOP/s"


def _memory_text(memory: PeakMemory) -> str:
    device = f", {memory.device_mib:,.0f} MiB on the device" if memory.device_mib else ""
    planned = ""
    if memory.planned_mib is not None and memory.growth_mib is not None:
        taken = memory.device_mib or memory.growth_mib
        planned = f"; the model's {taken:,.0f} MiB, at most {memory.planned_mib:,.0f} expected"
    return f"{memory.host_mib:,.0f} MiB resident{device} (largest rank){planned}"
