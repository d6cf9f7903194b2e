"""Reading a config: what is accepted, and one line with the fix for what is not."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import pydantic
import pytest
import yaml
from pydantic import Field

from bert_fast.config import Config, Section, as_plain, sections
from bert_fast.config import load as load_module
from bert_fast.config.choices import STRATEGIES, Choice, one_of
from bert_fast.config.load import config_from_tree, describe_fields, load_config
from bert_fast.config.yaml_files import to_yaml, validate
from bert_fast.errors import UserError

BASE: dict[str, dict[str, Any]] = {
    "model": {"hidden_size": 24, "num_heads": 4},
    "batch": {"global_batch_size": 8, "micro_batch_size": 8},
    "schedule": {"total_steps": 10},
    "train": {"max_steps": 10},
    "evaluation": {"every_samples": 8},
}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE), encoding="utf-8")
    return path


def with_value(path: str, value: Any) -> dict[str, Any]:
    tree: dict[str, Any] = copy.deepcopy(BASE)
    section, _, field = path.partition(".")
    if field:
        tree.setdefault(section, {})[field] = value
    else:
        tree[section] = value
    return tree


def error_of(tree: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        config_from_tree(tree, "run.yaml")
    return str(caught.value)


def test_file_values_win_over_defaults_and_overrides_over_the_file(config_file: Path) -> None:
    config = load_config(
        config_file, ["batch.global_batch_size=16", "system.world_size=2", "communication.bucket_mb=[1, 4.5]"]
    )
    assert config.model.hidden_size == 24
    assert config.model.vocab_size == 30522
    assert config.batch.global_batch_size == 16
    assert config.communication.bucket_mb == [1.0, 4.5]


def test_override_reaches_a_section_the_file_leaves_out(config_file: Path) -> None:
    assert load_config(config_file, ["optimizer.name=lamb"]).optimizer.name == "lamb"


def test_override_of_a_nested_mapping(config_file: Path) -> None:
    config = load_config(config_file, ["communication.clip_groups={all: '.*'}"])
    assert config.communication.clip_groups == {"all": ".*"}


def test_null_override_clears_a_value(config_file: Path) -> None:
    assert load_config(config_file, ["evaluation.target_accuracy=0.5"]).evaluation.target_accuracy == 0.5
    assert load_config(config_file, ["evaluation.target_accuracy=null"]).evaluation.target_accuracy is None


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4", "+1e-4", ".1e-3"])
def test_floats_as_people_write_them(config_file: Path, text: str) -> None:
    """YAML 1.1 reads `1e-4` as a string."""
    config_file.write_text(config_file.read_text() + f"optimizer: {{lr: {text}}}\n")
    assert load_config(config_file).optimizer.lr == pytest.approx(1e-4, rel=1e-12)
    assert load_config(config_file, [f"optimizer.lr={text}"]).optimizer.lr == pytest.approx(1e-4, rel=1e-12)


def test_floats_inside_lists() -> None:
    assert config_from_tree(with_value("communication.bucket_mb", ["1e0", "2.5"])).communication.bucket_mb == [1.0, 2.5]


@pytest.mark.parametrize("name", ["eagle", "e5", "run-1e", "2e-run"])
def test_names_with_an_e_stay_text(name: str) -> None:
    assert config_from_tree(with_value("run.name", name)).run.name == name


@pytest.mark.parametrize("name", ["1e-4", "3e10"])
def test_a_run_named_like_a_number_stays_text(name: str) -> None:
    assert config_from_tree(with_value("run.name", name)).run.name == name


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("optimizer.weight_deacy", "optimizer.weight_decay"),
        ("communication.bucket_size_mb", "communication.bucket_mb"),
        ("batch.globalbatch", "batch.global_batch_size"),
        ("model.hidden", "model.hidden_size"),
        ("optimiser", "optimizer"),
        ("data.seed", "train.seed"),  # the right field in the wrong section
    ],
)
def test_unknown_field_names_the_nearest(path: str, near: str) -> None:
    text = error_of(with_value(path, 1))
    assert f"unknown field {path}" in text
    assert f"did you mean {near}?" in text


def test_unknown_field_without_a_near_one_points_to_help() -> None:
    assert "--help lists every field" in error_of(with_value("zzz", 1))


def test_mistyped_override_names_the_nearest(config_file: Path) -> None:
    with pytest.raises(UserError, match=r"run\.yaml: unknown field train\.max_step; did you mean train\.max_steps\?"):
        load_config(config_file, ["train.max_step=3"])


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("model.num_layers", "twelve", ["model.num_layers", "integer", "'twelve'"]),
        ("model.num_layers", 2.5, ["model.num_layers", "integer", "2.5"]),
        ("model.num_layers", 0, ["model.num_layers", "greater than 0", "0"]),
        ("optimizer.lr", -1.0, ["optimizer.lr", "greater than 0", "-1.0"]),
        ("optimizer.lr", float("nan"), ["optimizer.lr", "finite", "nan"]),
        ("optimizer.beta1", 1.0, ["optimizer.beta1", "less than 1"]),
        ("model.hidden_dropout", 1.0, ["model.hidden_dropout", "less than 1"]),
        ("evaluation.target_accuracy", 72, ["evaluation.target_accuracy", "less than 1", "72"]),
        (
            "balance.strategy",
            "sorted",
            ["balance.strategy", "'random'", "'stratified_presort'", "'balanced'", "'sorted'"],
        ),
        ("train.compile", "maybe", ["train.compile", "boolean", "'maybe'"]),
        ("model", 3, ["model", "dictionary", "3"]),
        ("communication.bucket_mb", [1, -1], ["communication.bucket_mb", "greater than 0", "-1"]),
        ("system.master_port", 70000, ["system.master_port", "65535", "70000"]),
        ("run.name", "", ["run.name", "at least 1 character"]),
    ],
)
def test_wrong_type_or_range_names_field_rule_and_value(path: str, value: Any, parts: list[str]) -> None:
    text = error_of(with_value(path, value))
    for part in parts:
        assert part in text


def test_missing_fields_are_named_with_the_fix() -> None:
    tree = copy.deepcopy(BASE)
    del tree["batch"]["micro_batch_size"], tree["schedule"]
    text = error_of(tree)
    assert "field batch.micro_batch_size is missing; add it or pass batch.micro_batch_size=VALUE" in text
    assert "field schedule is missing" in text


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"batch.gradient_accumulation_steps": 2, "system.world_size": 3},
            ["batch.global_batch_size=8", "8 x 3 x 2 = 48", "set batch.global_batch_size=48"],
        ),
        (
            {"batch.global_batch_size": 16},
            ["batch.global_batch_size=16", "8 x 1 x 1 = 8", "set batch.global_batch_size=8"],
        ),
        ({"model.num_heads": 5}, ["model.num_heads=5", "model.hidden_size=24", "set model.num_heads=4"]),
        ({"data.max_seq_len": 1024}, ["data.max_seq_len=1024", "model.max_positions=512", "raise model.max_positions"]),
        (
            {"system.world_size": 4, "system.ranks_per_node": 3, "batch.micro_batch_size": 2},
            ["system.ranks_per_node=3", "system.world_size=4", "set ranks_per_node"],
        ),
        ({"mlperf.division": "closed"}, ["division=closed", "optimizer.name=adamw", "set optimizer.name=lamb"]),
        ({"train.precision": "fp16", "system.device": "cpu"}, ["train.precision=fp16", "CUDA", "bf16 or fp32"]),
        (
            {"model.attention_backend": "varlen", "model.attention_dropout": 0.1},
            ["attention_backend=varlen", "set model.attention_dropout=0"],
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_cross_field_checks_say_the_fix(changes: dict[str, Any], parts: list[str]) -> None:
    tree = copy.deepcopy(BASE)
    for path, value in changes.items():
        section, field = path.split(".")
        tree.setdefault(section, {})[field] = value
    text = error_of(tree)
    for part in parts:
        assert part in text


def test_following_the_fix_fixes_it() -> None:
    assert config_from_tree(
        {
            **BASE,
            "batch": {"global_batch_size": 48, "micro_batch_size": 8, "gradient_accumulation_steps": 2},
            "system": {"world_size": 3},
        }
    )
    closed = {**BASE, "mlperf": {"division": "closed"}, "optimizer": {"name": "lamb"}}
    assert config_from_tree(closed).mlperf.division == "closed"


@pytest.mark.parametrize("cost", ["flops", "measure", "a/cost.json", {"linear": 1, "quadratic": 0}])
def test_costs(cost: Any) -> None:
    config = config_from_tree(with_value("balance.cost", cost))
    assert as_plain(config)["balance"]["cost"] == cost
    assert config.balance.cost_path == (cost if cost == "a/cost.json" else None)


@pytest.mark.parametrize(
    "cost", ["flop", 3, None, {"linear": 1}, {"linear": -1, "quadratic": 1}, {"linear": 1, "slope": 1}]
)
def test_what_is_not_a_cost_gets_one_line_that_says_what_is(cost: Any) -> None:
    text = error_of(with_value("balance.cost", cost))
    assert text.startswith("run.yaml: balance.cost: must be flops, measure, the path of a .json file, or {linear: A, ")
    assert text.count("balance.cost") == 1


def test_costs_that_are_all_zero_are_refused() -> None:
    text = error_of(with_value("balance.cost", {"linear": 0, "quadratic": 0}))
    assert text == "run.yaml: balance.cost: linear and quadratic are both 0; set one of them to a positive number"


def test_clip_group_pattern_that_is_no_regular_expression() -> None:
    assert "clip_groups" in error_of(with_value("communication.clip_groups", {"all": "("}))


def test_every_problem_is_reported_once_on_one_line() -> None:
    tree = with_value("model.num_layers", "x")
    tree["optimizer"] = {"lrr": 1, "beta1": 2}
    del tree["train"]["max_steps"]
    text = error_of(tree)
    assert "\n" not in text
    assert text.startswith("run.yaml: ")
    problems = (
        text.removeprefix("run.yaml: ").replace("; did you mean", ", did you mean").replace("; add it", ", add it")
    )
    assert len(problems.split("; ")) == 4, problems
    for field in ("model.num_layers", "optimizer.lrr", "optimizer.beta1", "train.max_steps"):
        assert text.count(f"{field}:") + text.count(f"field {field}") == 1, field


def test_frozen() -> None:
    config = config_from_tree(BASE)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.batch.global_batch_size = 9  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.model = config.model  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "not of the form section.field=value"),
        ("=3", "not of the form section.field=value"),
        ("optimizer.lr={", "not valid YAML"),
        ("model.hidden_size.x=3", "is a value, not a section"),
        ("model=3", "dictionary"),
    ],
)
def test_malformed_overrides(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(config_file, [override])


@pytest.mark.parametrize(
    ("text", "kind"),
    [("2026-11-26", "a date"), ("yes", "true or false"), ("12:30:45", "a number"), ("0x10", "a number")],
)
def test_text_that_yaml_reads_as_something_else_is_to_be_quoted(config_file: Path, text: str, kind: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(config_file, [f"run.name={text}"])
    quoted = f"""run.name='"{text}"'"""
    assert f"run.name: {text} is read as {kind}" in str(caught.value)
    assert quoted in str(caught.value)
    assert load_config(config_file, [quoted.replace("'", "")]).run.name == text  # what the shell leaves of it


def test_seeds_of_a_clock_in_nanoseconds(config_file: Path) -> None:
    now = 1_795_651_200_123_456_789
    assert load_config(config_file, [f"train.seed={now}"]).train.seed == now
    with pytest.raises(UserError, match=r"train\.seed: .*9223372036854775807"):
        load_config(config_file, [f"train.seed={2**63}"])


def test_file_that_is_not_there_lists_those_that_are(config_file: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.yaml does not exist; there are: .*run\.yaml"):
        load_config(config_file.parent / "missing.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"run: {name: \xff}", "not UTF-8"),
        (b"run:\n  name: 'x\nmodel: 3\n", r"line \d+ is not valid YAML"),
        (b"- a\n- b\n", "must hold sections"),
        (b"just text", "must hold sections"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_empty_file_reports_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    with pytest.raises(UserError, match="field batch is missing"):
        load_config(path)


def test_help_lists_every_field_with_default_and_meaning() -> None:
    text = describe_fields()
    for section, model in sections().items():
        for name, field in model.model_fields.items():
            assert f"  {section}.{name} (" in text
            assert field.description, f"{section}.{name} has no description"
            assert field.description in text
    assert "batch.global_batch_size (int, required)" in text
    assert "optimizer.lr (float, default 0.0001)" in text
    assert "balance.strategy (random|pad_to_longest|exchange|exchange_snake|stratified_presort|balanced|" in text
    assert "communication.bucket_mb (auto|float|list[float], default 25.0)" in text
    assert "balance.cost (flops|measure|{linear, quadratic}|str, default flops)" in text
    assert "run.profile (bool, default false)" in text
    assert "run.folder (str|none, default unset)" in text


COLOURS = {"red": Choice("paints:red", "the warm one"), "blue": Choice("paints:blue", "the cold one")}


class Colours(Section):
    colour: Annotated[str, one_of(COLOURS)] = Field("red", description="colour of the wall")


def test_help_lists_the_names_of_a_table_with_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "sections", lambda: {"run": Colours})
    assert describe_fields().splitlines()[2:] == [
        "  run.colour (red|blue, default red)",
        "      colour of the wall",
        "      red   the warm one",
        "      blue  the cold one",
    ]


def test_a_name_that_is_not_in_the_table_gets_the_nearest() -> None:
    with pytest.raises(UserError) as refused:
        validate(Colours, {"colour": "bleu"}, "wall.yaml")
    assert str(refused.value) == "wall.yaml: colour: must be one of 'red', 'blue' (did you mean blue?), got 'bleu'"


@pytest.mark.parametrize("as_overrides", [False, True])
def test_printed_config_reads_back_the_same(
    tmp_path: Path, as_overrides: bool, make_config: Callable[..., Config]
) -> None:
    config = make_config(
        "communication.clip_groups={a: '^layers', b: '.*'}", "communication.bucket_mb=[0.5, 1e2]", "optimizer.eps=1e-9",
        "optimizer.lr=0.00039299421615882676", "run.name='été: #1'", "evaluation.target_accuracy=0.36",
    )  # fmt: skip
    plain = as_plain(config)
    path = tmp_path / "printed.yaml"
    if as_overrides:
        path.write_text("{}")
        overrides = [
            f"{s}.{f}={yaml.safe_dump(v, default_flow_style=True, width=10**6).removesuffix(chr(10)).removesuffix('...')}"
            for s, fields in plain.items()
            for f, v in fields.items()
        ]
        assert load_config(path, overrides) == config
    else:
        path.write_text(to_yaml(plain), encoding="utf-8")
        assert load_config(path) == config


# ---- balance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["balance.strategy=stratified_presort", "balance.num_strata=2", "balance.strata_counts=[2, 2]"],
            r"strata_counts=\[2, 2\] add up to 4, and a rank takes .* = 8 samples per step; make them add up to 8",
        ),
        (
            ["balance.strategy=stratified_presort", "balance.strata_counts=[4, 4]"],
            "strata_counts has 2 numbers for 4 strata; set one number per stratum",
        ),
        (["balance.strategy=stratified_presort", "balance.strata=[16, 8, 32]"], r"strata=\[16, 8, 32\] must ascend"),
        (
            ["balance.strategy=stratified_presort", "balance.strata=[8, 16]"],
            r"balance\.strata=\[8, 16\] must end with data\.max_seq_len=32",
        ),
        (
            ["balance.strategy=balanced_free", "balance.max_tokens=31"],
            "one sample of data.max_seq_len=32 .*at least 32",
        ),
        (["balance.strategy=packed", "balance.num_packs=9"], "num_packs=9 is more than .*; set it to at most 8"),
    ],
)
def test_settings_of_balance_fit_together(
    make_config: Callable[..., Config], overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_config(*overrides)


def test_unknown_strategy_lists_the_known_ones() -> None:
    text = error_of(with_value("balance.strategy", "sorted"))
    for name in STRATEGIES:
        assert f"'{name}'" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["communication.engine=ddp"],
            r"optimizer\.step_per_bucket=true needs communication\.engine=bucketed and it is ddp",
        ),
        (
            ["communication.clip=global_after_reduce"],
            r"needs communication\.clip=none or bucket_before_reduce: with global_a",
        ),
        (["communication.clip=global_before_reduce"], r"set optimizer\.step_per_bucket=false"),
    ],
)
def test_updates_by_bucket_need_an_update_that_is_known(
    make_config: Callable[..., Config], overrides: list[str], message: str
) -> None:
    make_config("optimizer.step_per_bucket=true")
    with pytest.raises(UserError, match=message):
        make_config("optimizer.step_per_bucket=true", *overrides)


@pytest.mark.parametrize("name", ["int8_ef", "fp8_ef", "topk_ef", "powersgd"])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["communication.engine=ddp"],
            r"needs communication\.engine=bucketed and it is ddp.*reduce_dtype to fp32 or bf16",
        ),
        (["batch.virtual_ranks=2"], r"virtual_ranks=2 has several on a rank; set virtual_ranks=1"),
        (["train.precision=fp16", "system.device=cuda"], r"loss scale .* set train\.precision=bf16"),
        (
            ["train.cuda_graphs=true", "system.device=cuda", "model.attention_backend=torch_flash"],
            r"set train\.cuda_graphs=f",
        ),
    ],
)
def test_a_lossy_wire_format_that_cannot_be_had_is_refused(
    make_config: Callable[..., Config], name: str, overrides: list[str], message: str
) -> None:
    make_config(f"communication.reduce_dtype={name}")
    with pytest.raises(UserError, match=message):
        make_config(f"communication.reduce_dtype={name}", *overrides)


def test_powersgd_is_not_sharded(make_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"factors of whole matrices.*; set shard_optimizer=false"):
        make_config("communication.reduce_dtype=powersgd", "communication.shard_optimizer=true")


GRAPHS = ["train.cuda_graphs=true", "system.device=cuda", "model.attention_backend=torch_flash"]
ZERO_ONE = ["optimizer.name=zero_one_adam", "communication.reduce_dtype=zero_one", "communication.exact_steps=2"]
PACKAGE = ["optimizer.name=pytorch_optimizer", "optimizer.class_name=SOAP"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.name=lamb", "optimizer.trust=global", "optimizer.step_per_bucket=true"], "trust=global needs norms over"),
        (["optimizer.name=lamb", "optimizer.trust=group", "optimizer.step_per_bucket=true"], "trust=group needs norms over"),
        (["optimizer.name=schedule_free", "optimizer.step_per_bucket=true"], "one number for all tensors"),
        ([*PACKAGE, "optimizer.step_per_bucket=true"], r"set optimizer\.step_per_bucket=false"),
        (["optimizer.name=muon", "communication.shard_optimizer=true"], "whole matrices.*set communication.shard_opt.*=false"),
        ([*PACKAGE, "communication.shard_optimizer=true"], "may need whole tensors; set communication.shard_optimizer=false"),
        (["optimizer.name=nadamw", *GRAPHS], r"cannot hold a step of optimizer\.name=nadamw; .* or adam or lamb or muon"),
        (["optimizer.name=schedule_free", *GRAPHS], r"cannot hold a step of optimizer\.name=schedule_free"),
        (["optimizer.name=pytorch_optimizer"], r"needs a class; set optimizer\.class_name, to SOAP for example"),
        (["optimizer.name=schedule_free", "averaging.method=last"], r"averages its weights itself; set averaging\.method=none"),
        ([*ZERO_ONE, "averaging.method=last"], r"ranks have different weights; set averaging\.method=none"),
        ([*ZERO_ONE, "optimizer.step_per_bucket=true"], "a local step reduces no bucket.*; set optimizer.step_per"),
        (["communication.reduce_dtype=powersgd", "communication.exact_steps=1000000"], "would never compress; set exact_st"),
        (["optimizer.name=mfac_sparse", "optimizer.block=50"], "less than one number.*set block to at least 100, or leave it"),
        (["optimizer.name=mfac_sparse", "optimizer.block=40000"], r"optimizer\.block"),
        (["optimizer.name=onebit_adam"], r"goes with communication\.reduce_dtype=onebit, not fp32; set it"),
        (["communication.reduce_dtype=onebit"], "goes with optimizer.name=onebit_adam or onebit_lamb and it"),
        (["optimizer.name=mfac_lowrank", "communication.shard_optimizer=true"], "whole matrices.*set communication.shard_opt"),
    ],
)  # fmt: skip
def test_what_an_optimizer_cannot_do_is_refused(
    make_config: Callable[..., Config], overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        make_config(*overrides)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.name=muon", "optimizer.step_per_bucket=true"],
        ["optimizer.name=muon", *GRAPHS],
        ["optimizer.name=nadamw", "optimizer.step_per_bucket=true", "communication.shard_optimizer=true"],
        ["optimizer.name=lamb", "optimizer.trust=global", "communication.shard_optimizer=true"],
        ["optimizer.name=schedule_free", "communication.shard_optimizer=true"],
    ],
)
def test_what_an_optimizer_can_do_is_allowed(make_config: Callable[..., Config], overrides: list[str]) -> None:
    make_config(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.decay_from=warmup_end", "schedule.warmup_steps=100"], "ends the decay before it begins .*raise total"),
        (["schedule.decay=steps"], r"needs schedule\.milestones; list the steps"),
        (["schedule.decay=steps", "schedule.milestones=[5, 5]"], "must ascend; sort them and name each step once"),
        (["schedule.decay=warmup_stable_decay", "schedule.decay_steps=101"], "is more than schedule.total_steps=100; lower it"),
        (["schedule.decay_from=warmup_end", "schedule.warmup_steps=60", "schedule.start_warmup_step=40"], "begins at step 100"),
        (["schedule.decay=warmup_stable_decay", "schedule.warmup_steps=91"], "last 10 steps .* warm-up, which ends at step 91"),
        (["schedule.end_lr=1"], "the rate would rise; lower it"),
        (["schedule.decay=cosine", "schedule.end_lr=1"], "the rate would rise; lower it"),
        (["batch.virtual_ranks=2"], "16; set batch.global_batch_size=16"),
        (["batch.virtual_ranks=2", "batch.micro_batch_size=4", "communication.engine=ddp"], "needs communication.engine=buck"),
    ],
)  # fmt: skip
def test_schedules_and_virtual_ranks_fit_together(
    make_config: Callable[..., Config], overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_config(*overrides)


def numeric_fields() -> list[str]:
    """Every field of the config that takes a number."""
    found = []
    for section, model in sections().items():
        for name, field in model.model_fields.items():
            if re.search(r"\b(int|float)\b", str(field.annotation)):
                found.append(f"{section}.{name}")
    return found


@pytest.mark.parametrize("field", numeric_fields())
@pytest.mark.parametrize("value", ["1e31", "100000000000000000000000000000001", ".inf", ".nan", "-1e31"])
def test_every_number_has_bounds(config_file: Path, field: str, value: str) -> None:
    value = f"[{value}]" if field in ("balance.strata", "balance.strata_counts") else value
    with pytest.raises(UserError, match=rf": .*{field}") as caught:
        load_config(config_file, [f"{field}={value}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["model.hidden_size=100000000001", "model.vocab_size=10000000000"])
def test_a_slip_of_the_keyboard_is_refused_at_once(config_file: Path, override: str) -> None:
    with pytest.raises(UserError, match=f"{override.partition('=')[0]}: .*less than or equal to"):
        load_config(config_file, [override])


def nested_aliases(first: str, form: str) -> str:
    """Ten lines that stand for 10^10 values."""
    names = ["a", *(f"k{index}" for index in range(9))]
    lines = [f"{name}: &{name} " + form.format(", ".join([f"*{before}"] * 10)) for before, name in pairwise(names)]
    return "\n".join([first, *lines])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("run: &a {name: *a}", "contains itself|undefined alias"),
        ("run: &a [*a]", "contains itself"),
        ("run: " + "[" * 5000, "nests more than"),
        (nested_aliases("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]", "[{}]"), "stands for more than"),
        (nested_aliases("a: &a {x: 1}", "{{<<: [{}]}}"), "entries"),
        ("run: {name: 2026-13-45}", "a value is not what it looks like"),
        ("run: {name: 2026-11-26}", r'run\.name: 2026-11-26 is read as a date, .*write run\.name: "2026-11-26" in a file'),
        ("run: {name: 12}", r'run\.name: 12 is read as a number, .*write run\.name: "12" in a file'),
        ('run: {name: "a\\0b"}', r"run\.name: a text holds the character"),
        ('run: {name: "\\ud800"}', r"run\.name: .*unicode string"),
        (f"run: {{name: {'x' * 5000}}}", "5,000 characters"),
        ("run: {name: x}" + " " * (1 << 18), "larger than"),
        ("1: 2", "keys that are not words"),
        ("train: {seed: 0x" + "f" * 9000 + "}", r"train\.seed: .*a number of about 2\^36000"),
        ("train: {seed: " + "9" * 9000 + "}", r"is not valid YAML|train\.seed"),
    ],
)  # fmt: skip
def test_yaml_that_stands_for_more_than_it_is(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 4000
