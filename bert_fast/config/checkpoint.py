"""Starting weights, checkpoints, and the final model."""

from __future__ import annotations

from pydantic import Field

from bert_fast.config.section import NonNegativeInt, PositiveInt, Seconds, Section


class CheckpointConfig(Section):
    """From which weights a run starts, and what it writes to be resumed or used later."""

    init_from: str | None = Field(
        None,
        description="folder with config.json + model.safetensors (Hugging Face form), or prefix of a TensorFlow checkpoint "
        "(model.ckpt-28252), to start from",
    )
    every_steps: NonNegativeInt = Field(0, description="steps between checkpoints; 0: only when stopped")
    async_save: bool = Field(
        True, description="go on training while a checkpoint is written (off: wait for it, as at the end of a run)"
    )
    keep_last: PositiveInt = Field(2, description="how many checkpoints stay on disk")
    timeout_s: Seconds = Field(
        600.0,
        description="seconds that a rank may take to write its part of a checkpoint, or to hash it; then it is lost",
    )
    save_final_model: bool = Field(
        False, description="write the final weights and the store's tokenizer as a Hugging Face folder"
    )
