"""Name, folder and extra output of a run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bert_fast.config.section import NonNegativeFloat, NonNegativeInt, Section


class RunConfig(Section):
    name: str = Field("run", description="name of the run; its folder is results_dir/name-seedN", min_length=1)
    results_dir: str = Field("runs", description="where run folders go")
    folder: str | None = Field(None, description="the run's folder itself, instead of results_dir/name-seedN")
    tensorboard: bool = Field(True, description="write TensorBoard events beside metrics.jsonl")
    measure_peak_flops: bool = Field(True, description="measure the matmul ceiling before the clock (for the MFU)")
    price_per_kwh: NonNegativeFloat | None = Field(None, description="money a kWh costs, for the report; any currency")
    gco2_per_kwh: NonNegativeFloat | None = Field(
        None, description="grams of CO2 equivalent a kWh stands for, for the report"
    )
    profile: bool = Field(
        False,
        description="write trace.json (Chrome, Perfetto): buckets, clips, collectives, updates of some steps as tracks",
    )
    profile_after: NonNegativeInt = Field(5, description="steps before the first that is traced")
    profile_steps: Annotated[int, Field(gt=0, le=1000)] = Field(3, description="how many steps are traced")
