"""Stage `environment`: versions, card, driver; peaks of matmul, of memory and of launches, as the card is found."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch

from bert_fast.hardware import cpu_has_bf16, cpu_name

from .stage import Context, NotAvailable
from .timing import repeat

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "numpy",
    "pydantic",
    "mlperf-logging",
    "flash-attn",
    "transformer-engine",
    "apex",
    "nvidia-ml-py",
)
_QUERY = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu", "pstate")


def run(context: Context) -> None:
    result, device = context.result, context.device
    facts: dict[str, object] = {"python": platform.python_version(), "cpu": cpu_name()}
    facts["packages"] = {name: _version(name) for name in _PACKAGES}
    facts["torch"] = torch.__version__
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "card": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "devices": torch.cuda.device_count(),
            **_nvidia_smi(),
        }
    result.details |= facts
    for name, rate in (
        ("bf16", _matmul(torch.bfloat16)),
        ("fp16", _matmul(torch.float16)),
        ("tf32", _tf32),
        ("fp32", _matmul(torch.float32)),
        ("fp8", _fp8),
    ):
        context.case(f"matmul {name}", partial(_note, context, f"peak_tflops/{name}", rate, 1e-12))
    context.case("memory bandwidth", partial(_note, context, "memory_gb_per_s", bandwidth, 1e-9))
    context.case("launch latency", partial(_note, context, "launch_us", _launch, 1e6))
    best = result.metrics.get("peak_tflops/bf16") or result.metrics.get("peak_tflops/fp32", 0.0)
    result.summary = f"{facts.get('card', facts['cpu'])}: {best:,.1f} TFLOP/s" + (
        f", {result.metrics['memory_gb_per_s']:,.0f} GB/s" if "memory_gb_per_s" in result.metrics else ""
    )


def _note(context: Context, metric: str, measure: Callable[[str], float], factor: float) -> None:
    context.result.metrics[metric] = factor * measure(context.device)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _nvidia_smi() -> dict[str, str]:
    """What the driver says of the card; empty where the tool is missing."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    values = [each.strip() for each in done.stdout.strip().split(",")]
    if done.returncode or len(values) != len(_QUERY):
        return {}
    named = dict(zip(_QUERY, values, strict=True))
    return {"driver": named.pop("driver_version"), **named}


def _matmul(dtype: torch.dtype) -> Callable[[str], float]:
    """FLOP/s of the best square matmul in a format."""

    def rate(device: str) -> float:
        if device == "cpu" and (dtype == torch.float16 or (dtype == torch.bfloat16 and not cpu_has_bf16())):
            raise NotAvailable(f"this CPU has no {str(dtype).removeprefix('torch.')} matmul of its own")
        best = 0.0
        for size in (4096, 8192) if device == "cuda" else (512,):
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            best = max(best, 2 * size**3 / min(repeat(lambda a=a, b=b: a @ b, device, 15)))  # type: ignore[misc]
        return best

    return rate


def _tf32(device: str) -> float:
    if device == "cpu":
        raise NotAvailable("CUDA only")
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return _matmul(torch.float32)(device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def _fp8(device: str) -> float:
    if device == "cpu" or torch.cuda.get_device_capability() < (8, 9):
        raise NotAvailable("needs a card of capability 8.9 or later")
    size = 8192
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    seconds = min(repeat(lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16), device, 15))
    return 2 * size**3 / seconds


def bandwidth(device: str) -> float:
    """Bytes/s of a copy inside the device's memory, read and written bytes counted."""
    source = torch.randn(2**28 if device == "cuda" else 2**23, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / min(repeat(lambda: target.copy_(source), device, 10))


def _launch(device: str) -> float:
    """Seconds of one small operation among many, which is what the host needs to launch it."""
    x, count = torch.zeros(1, device=device), 500 if device == "cuda" else 50

    def many() -> None:
        for _ in range(count):
            x.add_(1.0)

    return min(repeat(many, device, 5)) / count
