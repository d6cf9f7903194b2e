"""Every attention backend that runs here against plain formulas, forward and backward; and how one is chosen."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_fast.config.choices import ATTENTION_BACKENDS
from bert_fast.errors import UserError
from bert_fast.model.attention import SequenceLayout, choose_backend, find_backend

CPU = torch.device("cpu")


def runs_here(name: str) -> bool:
    try:
        choose_backend(name, CPU, torch.float32, 0.0)
    except UserError:
        return False
    return True


HERE = [name for name in ATTENTION_BACKENDS if runs_here(name)]
MIXES = {
    "sorted mix": [512, 512, 500, 310, 307, 64, 33, 5, 1],
    "unsorted": [3, 512, 17, 16, 15, 1, 129],
    "equal": [48, 48, 48],
    "one": [77],
    "one token": [1],
    "ones": [1, 1, 1, 1],
    "odd": [31, 29, 29, 23],
}


def layout_of(lengths: list[int]) -> SequenceLayout:
    starts = torch.cumsum(torch.tensor([0, *lengths]), 0).to(torch.int32)
    return SequenceLayout(list(lengths), starts)


def random_qkv(tokens: int, heads: int = 2, width: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, 3, heads, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def plain(qkv_T3HK: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Attention as the formula says it, head by head of sequence by sequence."""
    rows = []
    start = 0
    for length in lengths:
        heads = []
        for head in range(qkv_T3HK.shape[2]):
            query, key, value = qkv_T3HK[start : start + length, :, head].unbind(1)
            scores = torch.exp(query @ key.T / math.sqrt(query.shape[1]))
            heads.append(scores @ value / scores.sum(1, keepdim=True))
        rows.append(torch.cat(heads, 1))
        start += length
    return torch.cat(rows)


def forward_backward(name: str, lengths: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    qkv = random_qkv(sum(lengths), dtype=dtype)
    out = find_backend(name)(qkv, layout_of(lengths), 0.0) if name != "plain" else plain(qkv, lengths)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    (gradient,) = torch.autograd.grad((out * weights).sum(), qkv)
    return out.detach(), gradient


def test_the_oracle_and_two_grouped_ways_run_here() -> None:
    assert {"loop", "grouped", "matmul", "padded", "block_diagonal", "nested"} <= set(HERE)


@pytest.mark.parametrize("lengths", [[17, 5, 1], [40], [1]])
def test_loop_is_the_formula(lengths: list[int]) -> None:
    for found, expected in zip(
        forward_backward("loop", lengths, torch.float64), forward_backward("plain", lengths, torch.float64), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 4e-2)]
)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", [name for name in HERE if name != "loop"])
def test_backend_equals_loop(name: str, mix: str, dtype: torch.dtype, tolerance: float) -> None:
    """bf16 is held against fp64: three digits, and no worse than what rounding the inputs allows."""
    lengths = MIXES[mix]
    found = forward_backward(name, lengths, dtype)
    reference = forward_backward("loop", lengths, torch.float64 if dtype == torch.bfloat16 else dtype)
    for a, b, what in zip(found, reference, ("out", "gradient"), strict=True):
        assert a.shape == b.shape
        assert a.dtype == dtype
        assert torch.isfinite(a).all()
        error = (a.double() - b.double()).abs().max() / b.abs().max().double()
        assert error < tolerance, f"{what}: {error:.1e}"


@settings(max_examples=40)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=9))
def test_any_lengths(lengths: list[int]) -> None:
    reference = forward_backward("loop", lengths, torch.float64)
    for name in HERE:
        for a, b in zip(forward_backward(name, lengths, torch.float64), reference, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", HERE)
def test_sequences_do_not_see_each_other(name: str) -> None:
    lengths = [30, 29, 12]
    qkv = random_qkv(sum(lengths)).detach()
    changed = qkv.clone()
    changed[30:59] = torch.randn_like(changed[30:59])
    a, b = (find_backend(name)(x, layout_of(lengths), 0.0) for x in (qkv, changed))
    assert torch.equal(a[:30], b[:30])
    assert torch.equal(a[59:], b[59:])
    assert not torch.equal(a[30:59], b[30:59])


@pytest.mark.parametrize("name", HERE)
def test_a_layout_is_used_by_every_layer(name: str) -> None:
    """Groups are cached in the layout: a second call with other values must not see the first's."""
    lengths = [20, 19, 7]
    layout = layout_of(lengths)
    for seed in range(2):
        torch.manual_seed(seed)
        qkv = torch.randn(46, 3, 2, 4, dtype=torch.float64)
        torch.testing.assert_close(find_backend(name)(qkv, layout, 0.0), plain(qkv, lengths), rtol=1e-10, atol=1e-12)


def test_backends_that_share_a_layout_do_not_share_its_groups() -> None:
    lengths = [40, 30, 29, 20, 7]
    layout, qkv = layout_of(lengths), random_qkv(sum(lengths)).detach()
    for name in (*HERE, *reversed(HERE)):
        torch.testing.assert_close(find_backend(name)(qkv, layout, 0.0), plain(qkv, lengths), rtol=1e-10, atol=1e-12)
    assert layout.groups(0.0) != layout.groups(math.inf)
    assert layout.groups(0.15, 1) != layout.groups(0.15, 16)


@pytest.mark.parametrize("name", HERE)
def test_dropout_keeps_the_mean(name: str) -> None:
    """Averaged over many masks, dropout gives what none gives; a single mask does not."""
    lengths = [9, 9, 8]
    qkv, layout = random_qkv(26).detach(), layout_of(lengths)
    exact = find_backend(name)(qkv, layout, 0.0)
    draws = torch.stack([find_backend(name)(qkv, layout, 0.2) for _ in range(3000)])
    assert (draws[0] - exact).abs().max() > 0.05
    standard_error = draws.std(0) / 3000**0.5
    assert ((draws.mean(0) - exact).abs() < 5.5 * standard_error + 1e-12).all()


# ---- grouping -------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 512), min_size=1, max_size=40),
    st.sampled_from([0.0, 0.05, 0.15, math.inf]),
    st.sampled_from([1, 16]),
)
def test_groups_cover_the_tokens_and_keep_padding_below_the_slack(
    lengths: list[int], slack: float, multiple: int
) -> None:
    groups = layout_of(lengths).groups(slack, multiple)
    place, first = 0, 0
    for group in groups:
        members = lengths[first : first + group.count]
        rounded = [-(-n // multiple) * multiple for n in members]
        assert (group.start, group.end) == (place, place + sum(members))
        assert group.longest == max(rounded)
        assert group.longest * group.count <= sum(rounded) * (1 + slack)
        assert (group.index is None) == (set(members) == {group.longest})
        place, first = group.end, first + group.count
    assert place == sum(lengths)
    assert first == len(lengths)
    if slack == math.inf:
        assert len(groups) == 1


# ---- choosing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loop", "grouped", "matmul", "padded", "block_diagonal", "nested"])
def test_a_named_backend_is_never_replaced(name: str) -> None:
    for device in (CPU, torch.device("cuda")):
        assert choose_backend(name, device, torch.float32, 0.1) == name


def test_auto_on_the_cpu_runs_on_the_cpu() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert choose_backend("auto", CPU, dtype, 0.1) in HERE


@pytest.fixture
def flash_installed(monkeypatch: pytest.MonkeyPatch):
    """`flash_installed(True or False)`: pretend."""
    real = importlib.util.find_spec

    def set_to(there: bool) -> None:
        spec = importlib.machinery.ModuleSpec("flash_attn", None) if there else None
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *a: spec if name == "flash_attn" else real(name, *a)
        )

    return set_to


@pytest.mark.parametrize(
    ("dtype", "dropout", "flash", "expected"),
    [
        (torch.bfloat16, 0.1, True, "flash"),
        (torch.float16, 0.0, True, "flash"),
        (torch.bfloat16, 0.0, False, "varlen"),
        (torch.bfloat16, 0.1, False, "nested"),
        (torch.float32, 0.0, True, "grouped"),
    ],
)
def test_auto_on_cuda_goes_by_capability(
    dtype: torch.dtype, dropout: float, flash: bool, expected: str, flash_installed
) -> None:
    flash_installed(flash)
    assert choose_backend("auto", torch.device("cuda"), dtype, dropout) == expected


@pytest.mark.parametrize("name", ["varlen", "torch_flash", "flash"])
def test_gpu_backends_on_the_cpu_say_what_to_use(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"attention_backend={name} needs CUDA and bf16 or fp16, this run is cpu .*use matmul"
    ):
        choose_backend(name, CPU, torch.bfloat16, 0.0)


@pytest.mark.parametrize("name", ["varlen", "torch_flash", "flash"])
def test_gpu_backends_in_fp32_say_what_to_use(name: str) -> None:
    with pytest.raises(UserError, match=r"this run is cuda with torch\.float32"):
        choose_backend(name, torch.device("cuda"), torch.float32, 0.0)


@pytest.mark.parametrize("name", ["varlen", "flex"])
def test_dropout_with_a_backend_that_has_none_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name} has no dropout; set model\.attention_dropout=0"):
        choose_backend(name, torch.device("cuda"), torch.bfloat16, 0.1)


def test_flex_on_the_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="flex has no backward on cpu; use matmul"):
        choose_backend("flex", CPU, torch.float32, 0.0)


def test_packed_rows_hold_every_token_once_and_no_row_is_too_long() -> None:
    layout = layout_of([9, 7, 7, 3, 2, 1, 1])
    rows = layout.packed_rows()
    assert (rows.count, rows.longest) == (4, 9)
    assert rows.index is not None
    assert rows.places is not None
    assert rows.mask is not None
    assert torch.equal(rows.index[rows.places], torch.arange(30))
    assert rows.mask.shape == (4, 1, 9, 9)
    assert (rows.mask == rows.mask.transpose(-1, -2)).all()
    assert rows.mask[1].sum() == 7 * 7 + 2 * 2, "a sequence and two empty places"


def test_flash_that_is_not_installed_is_refused(flash_installed) -> None:
    flash_installed(False)
    with pytest.raises(UserError, match="needs the package flash-attn, which is not installed; use auto or grouped"):
        choose_backend("flash", torch.device("cuda"), torch.bfloat16, 0.0)
