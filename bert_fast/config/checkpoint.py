"""Starting weights, checkpoints, and the final model."""

from __future__ import annotations

from pydantic import Field

from bert_fast.config.section import NonNegativeInt, PositiveInt, Seconds, Section


class CheckpointConfig(Section):
    """From which weights a run starts, and what it writes to be resumed or used later. Read by the set-up and the loop."""

    init_from: str | None = Field(
        None,
        description="start from these weights: a folder with config.json and model.safetensors (as Hugging Face "
        "writes it), or the prefix of a TensorFlow checkpoint (model.ckpt-28252); random weights if unset",
    )
    every_steps: NonNegativeInt = Field(
        0, description="steps between checkpoints; 0: write one only when the run is stopped"
    )
    async_save: bool = Field(True, description="go on training while a checkpoint is written; false: wait until it is")
    keep_last: PositiveInt = Field(2, description="number of checkpoints that stay on disk; older ones are removed")
    timeout_s: Seconds = Field(
        600.0,
        description="seconds after which a rank that still writes or hashes its part of a checkpoint counts as lost",
    )
    save_final_model: bool = Field(
        False,
        description="write the final weights and the tokenizer of the store to the run's folder, as Hugging Face "
        "reads them",
    )
