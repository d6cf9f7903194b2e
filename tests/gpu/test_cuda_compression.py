"""On a CUDA device: codecs, windows and lossy formats against the same on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from bert_fast.compression.quantize import Codec, Fp8, Int4, Int8, Sign
from bert_fast.compression.ring import SparseWindow
from bert_fast.compression.topk import TopK
from bert_fast.config import Config
from bert_fast.config.choices import OPTIMIZERS, WIRE_FORMATS
from bert_fast.train.environment import Environment
from bert_fast.train.setup.build import build
from bert_fast.train.setup.warmup import synthetic_input

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PAIRED = {choice.wire: name for name, choice in OPTIMIZERS.items() if choice.wire}


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "codec",
    [Int8(128), Fp8(512), Fp8(64, "e5m2"), Int4(64), Sign(2048), TopK(0.01, 4096)],
    ids=lambda c: type(c).__name__,
)
def test_a_codec(codec: Codec) -> None:
    values = numbers(2, 100_000)
    message = codec.encode(values.cuda())
    expected = codec.decode(codec.encode(values), 100_000)
    decoded = codec.decode(message, 100_000).cpu()
    assert torch.isclose(decoded, expected, rtol=1e-5).float().mean() > 0.99
    torch.testing.assert_close(codec.decode(message.cpu(), 100_000), decoded, rtol=1e-6, atol=0)


def test_a_window() -> None:
    top_k = TopK(0.01, 100)
    here, there = SparseWindow(8, 50_050, top_k), SparseWindow(8, 50_050, top_k, "cuda")
    for seed in range(10):
        values = torch.randn(1, 50_050, generator=torch.Generator().manual_seed(seed))
        places, selected = top_k.select(values)
        here.push(places[0], selected[0])
        there.push(places[0].cuda(), selected[0].cuda())
    torch.testing.assert_close(there.gram.cpu(), here.gram, rtol=1e-5, atol=1e-5)
    weights = numbers(8)
    torch.testing.assert_close(there.combine(weights.cuda()).cpu(), here.combine(weights), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(there.products(values[0].cuda()).cpu(), here.products(values[0]), rtol=1e-5, atol=1e-4)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of NCCL with one rank, which sends to itself."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", [name for name, choice in WIRE_FORMATS.items() if not choice.is_cast])
def test_steps_over_nccl(make_config: Callable[..., Config], name: str) -> None:
    settings = [f"communication.reduce_dtype={name}", "system.device=cuda", "communication.bucket_mb=0.01"]
    if name in PAIRED:
        settings += [f"optimizer.name={PAIRED[name]}", "communication.exact_steps=2"]
    config = make_config(*settings)
    environment = Environment(0, 0, 1, torch.device("cuda", torch.cuda.current_device()), torch.float32)
    components = build(config, environment)
    for number in range(6):
        assert bool(components.step(synthetic_input(config, environment, number), 0.01).is_finite)
    assert components.engine.counters()["gradient_bytes"] > 0


@pytest.mark.parametrize("name", [name for name, choice in OPTIMIZERS.items() if choice.window is not None])
def test_preconditioners(make_config: Callable[..., Config], name: str) -> None:
    config = make_config(f"optimizer.name={name}", "optimizer.window=4", "system.device=cuda")
    environment = Environment(0, 0, 1, torch.device("cuda", torch.cuda.current_device()), torch.float32)
    components = build(config, environment)
    before = [p.detach().clone() for p in components.model.parameters()]
    for number in range(6):
        components.step(synthetic_input(config, environment, number), 1e-3)
    after = list(components.model.parameters())
    assert all(torch.isfinite(p).all() for p in after)
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
