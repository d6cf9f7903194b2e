"""FP8 matmuls of the encoder by NVIDIA's Transformer Engine, an optional package. Weights and moments stay in fp32.

Heads, embeddings and norms stay in bf16. Token counts must be multiples of 16 (`batch.shape_multiple`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from bert_fast.errors import UserError
from bert_fast.parts import declare_parts, parts_of

if TYPE_CHECKING:
    from bert_fast.model.bert import BertForPretraining  # which imports this module


def check_fp8(device: torch.device, shape_multiple: int) -> None:
    """Refuse a device or token counts that Transformer Engine cannot work with. Raises UserError."""
    if device.type != "cuda":
        raise UserError(f"train.precision=fp8 needs CUDA, this run is on {device.type}; set train.precision=bf16")
    if shape_multiple % 16:
        raise UserError(
            f"train.precision=fp8 needs token counts of 16s: batch.shape_multiple={shape_multiple}; set it to 64"
        )
    _engine()


def use_fp8(model: BertForPretraining) -> None:
    """Replace the encoder's linear layers by Transformer Engine's; parameters keep their values and names. Raises UserError."""
    engine = _engine()

    class Fp8GeluLinear(engine.Linear):  # type: ignore[misc, name-defined]  # known only where the package is installed
        """linear(gelu(x)), as `bert.GeluLinear`."""

        def forward(self, x_TF: torch.Tensor, form: str) -> torch.Tensor:
            return super().forward(F.gelu(x_TF, approximate=form))

    for layer in model.layers:
        for name, kind in (
            ("qkv", engine.Linear),
            ("attention_out", engine.Linear),
            ("up", engine.Linear),
            ("down", Fp8GeluLinear),
        ):
            old = getattr(layer, name)
            new = kind(
                old.in_features, old.out_features, bias=True, params_dtype=old.weight.dtype, device=old.weight.device
            )
            with torch.no_grad():
                new.weight.copy_(old.weight)
                new.bias.copy_(old.bias)
            declare_parts(new.weight, parts_of(old.weight))
            declare_parts(new.bias, parts_of(old.bias))
            setattr(layer, name, new)
    model.fp8 = True


def fp8_context(enabled: bool) -> AbstractContextManager[Any]:
    """The context for the encoder's forward; does nothing unless `enabled`."""
    return _engine().fp8_autocast(enabled=True) if enabled else nullcontext()


def _engine() -> Any:
    try:
        import transformer_engine.pytorch as engine
    except ImportError:
        raise UserError(
            "train.precision=fp8: transformer-engine is not installed; install it or set train.precision=bf16"
        ) from None
    return engine
