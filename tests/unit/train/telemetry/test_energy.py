"""Energy from a made-up powercap folder and a made-up NVML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.one_run import execute

from bert_fast.config import Config
from bert_fast.report.energy_cost import JOULES_PER_KWH, energy_cost
from bert_fast.train.environment import Environment
from bert_fast.train.evaluate import EvaluationRunner
from bert_fast.train.run_record import energy_record
from bert_fast.train.telemetry import energy as tally_module
from bert_fast.train.telemetry.energy import EnergyTally, summed
from bert_fast.train.telemetry.energy_meter import EnergyMeter, EnergyReading
from bert_fast.train.telemetry.step_metrics import IntervalMetrics

RANGE_UJ = 262_143_328_850


class NVMLError(Exception):
    pass


class FakeNvml:
    """GPUs by index; a handle is its index."""

    NVMLError = NVMLError

    def __init__(self, counters_mj: list[int], fails: str = "") -> None:
        self.counters_mj, self.fails, self.is_open = counters_mj, fails, False

    def nvmlInit(self) -> None:  # noqa: N802
        if self.fails == "init":
            raise NVMLError("Driver Not Loaded")
        self.is_open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.counters_mj)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        if self.fails == "read":
            raise NVMLError("Not Supported")
        return self.counters_mj[handle]


@pytest.fixture(autouse=True)
def _all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def put(root: Path, zone: str, name: str, energy_uj: int) -> None:
    folder = root / zone
    folder.mkdir(parents=True, exist_ok=True)
    for file, value in (("name", name), ("energy_uj", energy_uj), ("max_energy_range_uj", RANGE_UJ)):
        (folder / file).write_text(f"{value}\n")


def no_gpu() -> Any:
    return FakeNvml([], fails="init")


def test_rapl_counts_packages_and_memory_once(tmp_path: Path) -> None:
    zones = [
        ("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "dram"),
        ("intel-rapl:1", "package-1"), ("intel-rapl:2", "psys"), ("intel-rapl-mmio:0", "package-0"),
    ]  # fmt: skip
    for zone, name in zones:
        put(tmp_path, zone, name, 1_000_000)
    meter = EnergyMeter(tmp_path, no_gpu())
    meter.start()
    for number, (zone, name) in enumerate(zones):
        put(tmp_path, zone, name, 1_000_000 + 10**number * 1_000_000)
    reading = meter.stop()
    assert reading.joules_cpu == pytest.approx(1 + 100 + 1000)  # packages 0 and 1, memory
    assert reading.joules_gpu is None
    assert "2 CPU packages and memory" in reading.source
    assert "Driver Not Loaded" in reading.source


def test_rapl_wraps_between_ticks(tmp_path: Path) -> None:
    put(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 2_000_000)
    meter = EnergyMeter(tmp_path, no_gpu())
    meter.start()
    put(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    assert meter.tick().joules_cpu == pytest.approx(3.0)
    put(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 1_000_000)
    meter.tick()
    put(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    assert meter.stop().joules_cpu == pytest.approx(RANGE_UJ / 1e6 + 7.0)
    assert "memory" in meter.stop().source.split("not counted: ")[1]


def test_rapl_that_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "intel-rapl:0", "package-0", 1)
    read = Path.read_text

    def refuse(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    meter = EnergyMeter(tmp_path, FakeNvml([5000]))
    meter.start()
    reading = meter.stop()
    assert (reading.joules_gpu, reading.joules_cpu) == (0.0, None)
    assert "readable by root only" in reading.source


def test_gpus_are_added(tmp_path: Path) -> None:
    nvml = FakeNvml([1_000, 2_000, 9_000])
    meter = EnergyMeter(tmp_path, nvml)
    meter.start()
    nvml.counters_mj = [501_000, 702_000, 9_000]
    assert meter.tick().joules_gpu == pytest.approx(1200.0)
    assert nvml.is_open
    reading = meter.stop()
    assert not nvml.is_open
    assert reading.joules_gpu == pytest.approx(1200.0)
    assert "NVML (3 GPUs)" in reading.source
    assert "fans" in reading.source.split("not counted: ")[1]
    nvml.counters_mj[0] += 1000
    assert meter.stop() == reading


@pytest.mark.parametrize(("visible", "joules"), [("1", 2.0), ("GPU-2,0", 5.0), ("0,-1,2", 1.0)])
def test_only_visible_gpus_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, joules: float
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = FakeNvml([0, 0, 0])
    meter = EnergyMeter(tmp_path, nvml)
    meter.start()
    nvml.counters_mj = [1000, 2000, 4000]
    assert meter.stop().joules_gpu == pytest.approx(joules)


@pytest.mark.parametrize(("fails", "why"), [("init", "Driver Not Loaded"), ("read", "Not Supported")])
def test_nothing_is_estimated(tmp_path: Path, fails: str, why: str) -> None:
    meter = EnergyMeter(tmp_path, FakeNvml([5000], fails))
    meter.start()
    reading = meter.stop()
    assert (reading.joules_gpu, reading.joules_cpu) == (None, None)
    assert reading.source.startswith("none; not counted: GPUs")
    assert why in reading.source


def test_no_visible_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    meter = EnergyMeter(tmp_path, FakeNvml([5000]))
    meter.start()
    assert meter.stop().joules_gpu is None


def test_cost() -> None:
    assert energy_cost(2.0, 0.3, 400) == {"kwh": 2.0, "money": pytest.approx(0.6), "kg_co2e": pytest.approx(0.8)}
    assert energy_cost(2.0, gco2_per_kwh=0) == {"kwh": 2.0, "money": None, "kg_co2e": 0.0}
    assert energy_cost(None, 0.3, 400) == {"kwh": None, "money": None, "kg_co2e": None}


# ---- of a run -------------------------------------------------------------------------------------------------------


def test_a_nodes_first_rank_counts_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml([5000, 7000])
    monkeypatch.setattr(tally_module, "EnergyMeter", lambda: EnergyMeter(tmp_path, nvml))
    first, second = (EnergyTally(Environment(n, n, 2, torch.device("cpu"), torch.float32)) for n in range(2))
    for each in (first, second):
        each.start()
    for step in (1, 2):
        nvml.counters_mj = [mj + 1000 * step for mj in nvml.counters_mj]
        delta = first.delta()
        assert delta[0] == pytest.approx(2.0 * step), "since the last call"
        assert np.isnan(delta[1]), "no RAPL here"
        assert second.delta() == [0.0, 0.0]
    assert "NVML (2 GPUs)" in first.source


def test_what_was_once_not_known_stays_so() -> None:
    joules = summed([1.0, 2.0], np.array([[3.0, 1.0], [0.5, 0.0]]))
    assert joules == [4.5, 3.0]
    joules = summed(joules, np.array([[1.0, np.nan], [0.0, 0.0]]))
    assert joules == [5.5, None]
    assert summed(joules, np.ones((2, 2))) == [7.5, None]


class MadeUp(EnergyMeter):
    """What a test says that GPUs have taken."""

    joules = 0.0

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.first = MadeUp.joules

    def tick(self) -> EnergyReading:
        return EnergyReading(MadeUp.joules - self.first, None, "made up")

    stop = tick


def test_a_resumed_run_adds_to_what_the_checkpoint_had(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 J a step, 1,000 J an evaluation. The first session ends one step after its checkpoint."""
    monkeypatch.setattr(tally_module, "EnergyMeter", MadeUp)
    step, evaluate = IntervalMetrics.add, EvaluationRunner.run

    def costly(joules: float, real: Callable[..., Any]) -> Callable[..., Any]:
        def spend(*arguments: Any) -> Any:
            MadeUp.joules += joules
            return real(*arguments)

        return spend

    monkeypatch.setattr(IntervalMetrics, "add", costly(100.0, step))
    monkeypatch.setattr(EvaluationRunner, "run", costly(1000.0, evaluate))
    found = []
    for steps, resume in ((3, False), (5, True)):
        config = make_config(
            f"train.max_steps={steps}", "train.log_every_steps=1", "checkpoint.every_steps=2",
            "schedule.total_steps=9", "evaluation.every_samples=16",
        )  # fmt: skip
        assert config.batch.global_batch_size == 8, "so there is an evaluation after step 2, before its checkpoint"
        context, summary = execute(config, resume)
        found.append(energy_record(context, summary.state.progress))
    first, second = (each.gpu_kwh * JOULES_PER_KWH for each in found)
    assert first == pytest.approx(3 * 100 + 1000)
    assert second == pytest.approx(5 * 100 + 2 * 1000)
    assert [each.sessions for each in found] == ["all", "all, each before the last up to its last checkpoint"]
    assert found[1].cpu_kwh is None
