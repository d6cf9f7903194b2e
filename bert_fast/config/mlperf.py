"""The MLPerf log."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bert_fast.config.section import Section


class MlperfConfig(Section):
    enabled: bool = Field(True, description="write an MLPerf log and check it")
    division: Literal["open", "closed"] = Field("open", description="closed: LAMB only, and every closed rule")
    ruleset: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")] = Field(
        "5.0.0", description="mlperf-logging ruleset; 5.0.0 is BERT's last"
    )
    organization: str = Field("bert_fast", description="submission_org")
    platform: str = Field("unnamed", description="submission_platform")
    status: Literal["onprem", "cloud", "research", "preview"] = Field("research", description="submission_status")
    poc_name: str = Field("nobody", description="submission_poc_name")
    poc_email: str = Field("nobody@example.org", description="submission_poc_email")
    clear_caches: bool = Field(
        False,
        description="drop the operating system's caches first (needs root); else only cache_clear is logged false",
    )
