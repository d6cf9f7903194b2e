"""The MLPerf log."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bert_fast.config.section import Section


class MlperfConfig(Section):
    """What the MLPerf log says of a submission, and which rules it must keep. Read by `bert_fast.mlperf`."""

    enabled: bool = Field(True, description="write an MLPerf log and check it at the end of the run")
    division: Literal["open", "closed"] = Field(
        "open",
        description="open, or closed: a run that breaks a rule of the closed division is refused (LAMB only, for "
        "example)",
    )
    ruleset: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")] = Field(
        "5.0.0", description="rules of mlperf-logging that the log is checked with; 5.0.0 are the last with BERT"
    )
    organization: str = Field("bert_fast", description="name of the submitting organization (submission_org)")
    platform: str = Field("unnamed", description="name of the system (submission_platform)")
    status: Literal["onprem", "cloud", "research", "preview"] = Field(
        "research", description="availability of the system (submission_status)"
    )
    poc_name: str = Field("nobody", description="name of a person to contact (submission_poc_name)")
    poc_email: str = Field("nobody@example.org", description="address of a person to contact (submission_poc_email)")
    clear_caches: bool = Field(
        False,
        description="drop the caches of the operating system before the run, which needs root; false: leave them, and "
        "log cache_clear as false",
    )
