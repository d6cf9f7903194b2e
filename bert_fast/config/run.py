"""Name, folder and extra output of a run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bert_fast.config.section import NonNegativeFloat, NonNegativeInt, Section


class RunConfig(Section):
    """The name of a run, where it goes, and what it writes beyond its record. Read by `bert_fast.run_folder` and the loop."""

    name: str = Field("run", description="name of the run; its folder is results_dir/name-seedN", min_length=1)
    results_dir: str = Field(
        "runs", description="folder that holds the folders of runs; where run.folder is set, that is used instead"
    )
    folder: str | None = Field(None, description="folder of the run itself; results_dir/name-seedN if unset")
    tensorboard: bool = Field(True, description="write TensorBoard events as well as metrics.jsonl")
    measure_peak_flops: bool = Field(
        True,
        description="measure the FLOP/s of a large matrix product before the clock starts; the report needs it for "
        "the MFU",
    )
    price_per_kwh: NonNegativeFloat | None = Field(None, description="price per kWh in any currency, for the report")
    gco2_per_kwh: NonNegativeFloat | None = Field(None, description="grams of CO2 equivalent per kWh, for the report")
    profile: bool = Field(
        False,
        description="write trace.json for Chrome or Perfetto: the buckets, clips, collectives and updates of some "
        "steps as tracks",
    )
    profile_after: NonNegativeInt = Field(5, description="number of steps before the first that is traced")
    profile_steps: Annotated[int, Field(gt=0, le=1000)] = Field(3, description="number of steps that are traced")
