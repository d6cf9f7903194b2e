"""Settings that would have no effect are refused; those of a printed config, which are the defaults, are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bert_fast.config import Config, as_plain, sections
from bert_fast.config.effects import RULES
from bert_fast.config.load import config_from_tree
from bert_fast.errors import UserError

STRATIFIED = "balance.strategy=stratified_presort"
PACKED = "balance.strategy=packed"
AUTO = "communication.bucket_mb=auto"
REFERENCE = "schedule.counting=reference"
TWO_NODES = ("system.world_size=2", "system.ranks_per_node=1", "batch.micro_batch_size=4")
LOGGED = "mlperf.enabled=true"
LAMB, MUON, PACKAGE = "optimizer.name=lamb", "optimizer.name=muon", "optimizer.name=pytorch_optimizer"
SOAP = "optimizer.class_name=SOAP"
POWERSGD = "communication.reduce_dtype=powersgd"
INT8 = "communication.reduce_dtype=int8_ef"
ONEBIT_LAMB = ["optimizer.name=onebit_lamb", "communication.reduce_dtype=onebit", "communication.exact_steps=2"]
ZERO_ONE = ["optimizer.name=zero_one_adam", "communication.reduce_dtype=zero_one", "communication.exact_steps=2"]
FSDP = ["communication.engine=fsdp", "communication.clip=none"]
SPARSE = "optimizer.name=mfac_sparse"
CONTRASTIVE = "train.objective=contrastive"

# A setting; overrides with which it has an effect; overrides with which it has none, and the reason that is given
CASES = [
    ("balance.num_strata=2", [STRATIFIED], [], "balance.strategy=balanced does not read it; set .*=stratified_presort"),
    ("balance.num_strata=2", [STRATIFIED], [STRATIFIED, "balance.strata=[8, 32]"], "balance.strata lists the strata"),
    ("balance.strata=[8, 32]", [STRATIFIED], [], "balance.strategy=balanced does not read it"),
    ("balance.strata_counts=[2, 2, 2, 2]", [STRATIFIED], [], "balance.strategy=balanced does not read it"),
    ("balance.refine_ms=0", ["balance.strategy=balanced_free"], ["balance.strategy=exchange"], "exchange does not read it"),
    ("balance.max_tokens=100", ["balance.strategy=balanced_free"], [], "set balance.strategy=balanced_free, or leave"),
    ("balance.num_packs=4", [PACKED], [], "balanced does not read it; set balance.strategy=packed, or leave"),
    ("balance.max_samples_per_pack=3", [PACKED], [], "balance.strategy=balanced does not read it"),
    ("balance.pack_order=shortest", [PACKED], [], "balance.strategy=balanced does not read it"),
    ("communication.min_bucket_mb=1", [AUTO], [], "nothing is planned; set communication.bucket_mb=auto"),
    ("communication.max_bucket_mb=9", [AUTO], ["communication.bucket_mb=[1, 2]"], "nothing is planned"),
    ("communication.bucket_mb=3", [], FSDP, "engine=fsdp does not read it"),
    ("communication.reshard_after_forward=false", FSDP, [], "engine=bucketed does not read it; set communication.engine=fsdp"),
    ("communication.shard_within_node=true", FSDP, [], "engine=bucketed does not read it; set communication.engine=fsdp"),
    ("communication.max_norm=2", ["communication.clip=global_after_reduce"], ["communication.clip=none"], "clips no gradient"),
    ("communication.clip_groups=tensor", [], ["communication.clip=global_after_reduce"], "global_after_reduce clips no groups"),
    ("communication.residual_dtype=bf16", [INT8], ["communication.reduce_dtype=bf16"], "reduce_dtype=bf16 does not read it"),
    ("communication.density=0.1", ["communication.reduce_dtype=topk_ef"], [INT8], "reduce_dtype=int8_ef does not read it"),
    ("communication.powersgd_rank=2", [POWERSGD], [INT8], "reduce_dtype=int8_ef does not read it"),
    ("communication.exact_steps=5", [POWERSGD], [], "reduce_dtype=fp32 does not read it"),
    ("communication.var_update_scaler=4", ZERO_ONE, [], "reduce_dtype=fp32 does not read it"),
    ("communication.local_step_scaler=4", ZERO_ONE, [], "reduce_dtype=fp32 does not read it"),
    ("communication.local_step_clipper=4", ZERO_ONE, [], "reduce_dtype=fp32 does not read it"),
    ("memory.offload_weights=true", [*FSDP, "system.device=auto"], ["system.device=auto"], "needs all weights on the device"),
    ("optimizer.state_dtype=int8", [], [LAMB], "optimizer.name=lamb does not read it"),
    ("optimizer.state_on_host=true", ["system.device=auto"], [LAMB, "system.device=auto"], "name=lamb does not read it"),
    ("memory.budget_gib=8", ["memory.recompute=budget"], ["memory.recompute=optimal"], "is not chosen by a budget"),
    ("schedule.warmup_steps=4", ["schedule.start_warmup_step=-2"], ["schedule.start_warmup_step=-3"], "warm-up is over"),
    ("schedule.warmup_steps=3", [REFERENCE, "schedule.start_warmup_step=-2"],
     [REFERENCE, "schedule.start_warmup_step=-3"], "warm-up is over"),
    ("schedule.start_warmup_step=-2", ["schedule.warmup_steps=0"], ["schedule.warmup_steps=0", REFERENCE], "warm-up is over"),
    ("schedule.start_warmup_step=2", ["schedule.warmup_steps=0", REFERENCE],
     ["schedule.warmup_steps=1", "schedule.start_warmup_step=-1", REFERENCE], "warm-up is over"),
    ("schedule.counting=reference", ["schedule.start_warmup_step=-1"], [], "where schedule.start_warmup_step=0"),
    ("schedule.power=2", [], ["schedule.end_lr=0.001"], "the learning rate does not decay; lower schedule.end_lr"),
    ("schedule.power=2", [], ["schedule.decay=cosine"], "decay=cosine does not read it; set schedule.decay=polynomial"),
    ("schedule.end_lr=0.0001", ["schedule.decay=cosine"], ["schedule.decay=linear_to_zero"], "linear_to_zero does not read it"),
    ("schedule.decay_from=warmup_end", [], ["schedule.warmup_steps=0"], "without a warm-up .*; set schedule.warmup_steps"),
    ("schedule.decay_from=warmup_end", ["schedule.decay=linear_to_zero"], ["schedule.decay=warmup_stable_decay"],
     "warmup_stable_decay does not read it; set schedule.decay=polynomial or cosine or linear_to_zero"),
    ("schedule.decay_steps=5", ["schedule.decay=warmup_stable_decay"], [], "decay=polynomial does not read it"),
    ("schedule.milestones=[4, 5]", ["schedule.decay=steps"], [], "decay=polynomial does not read it; set schedule.decay=steps"),
    ("schedule.gamma=0.5", ["schedule.decay=steps", "schedule.milestones=[4]"], [], "decay=polynomial does not read it"),
    ("optimizer.beta1=0.5", [MUON], [PACKAGE, SOAP], "name=pytorch_optimizer does not read it; set optimizer.name=adamw or"),
    ("optimizer.beta2=0.5", ["optimizer.name=nadamw"], [PACKAGE, SOAP], "name=pytorch_optimizer does not read it"),
    ("optimizer.eps=0.5", ["optimizer.name=adam"], [PACKAGE, SOAP], "name=pytorch_optimizer does not read it"),
    ("optimizer.use_apex=true", ["optimizer.name=adam"], [LAMB], "name=lamb does not read it; set optimizer.name=adamw or"),
    ("optimizer.trust=global", [LAMB], [], "name=adamw does not read it; set optimizer.name=lamb"),
    ("optimizer.momentum=0.5", [MUON], [LAMB], "name=lamb does not read it; set optimizer.name=muon"),
    ("optimizer.nesterov=false", [MUON], [], "name=adamw does not read it"),
    ("optimizer.newton_schulz_steps=7", [MUON], [], "name=adamw does not read it"),
    ("optimizer.newton_schulz_dtype=fp32", [MUON], [], "name=adamw does not read it"),
    ("optimizer.adjust_lr=original", [MUON], [], "name=adamw does not read it"),
    ("optimizer.muon_lr=0.02", [MUON], ["optimizer.name=adam"], "name=adam does not read it"),
    (SOAP, [PACKAGE], [], "name=adamw does not read it; set optimizer.name=pytorch_optimizer"),
    ("optimizer.arguments={eps: 1}", [PACKAGE, SOAP], [], "name=adamw does not read it"),
    ("optimizer.factor_min=0.7", ONEBIT_LAMB, [], "name=adamw does not read it; set optimizer.name=onebit_lamb"),
    ("optimizer.factor_max=2", ONEBIT_LAMB, [], "name=adamw does not read it; set optimizer.name=onebit_lamb"),
    ("optimizer.window=5", [SPARSE], [], "name=adamw does not read it"),
    ("optimizer.density=0.5", [SPARSE], ["optimizer.name=mfac"], "name=mfac does not read it"),
    ("optimizer.block=200", ["optimizer.name=micro_adam"], ["optimizer.name=ggt"], "name=ggt does not read it"),
    ("optimizer.rank=2", ["optimizer.name=mfac_lowrank"], [SPARSE], "name=mfac_sparse does not read it"),
    *(
        (f"contrastive.{setting}", [CONTRASTIVE, *more], [], "train.objective=mlm_nsp compares no pairs")
        for setting, more in {
            "pooling=cls": [], "negatives=1": [], "scale=50": [], "learn_scale=true": [], "symmetric=false": [],
            "query_query=true": [], "key_key=true": [], "margin=0.1": [], "widths=[8, 16]": [], "loss_precision=bf16": [],
            "tile=[64, 64]": [], "ring_by_node=true": [],
        }.items()
    ),
    ("contrastive.max_scale=50", [CONTRASTIVE, "contrastive.learn_scale=true"], [CONTRASTIVE], "the scale stays as it is"),
    ("contrastive.width_weights=[1, 2]", [CONTRASTIVE, "contrastive.widths=[8, 16]"], [CONTRASTIVE], "names no widths"),
    ("data.mask_fraction=0.4", ["data.dynamic_masking=true"], [CONTRASTIVE], "predicts no tokens"),
    ("data.dynamic_masking=true", [], [CONTRASTIVE], "train.objective=contrastive predicts no tokens"),
    ("model.next_sentence=false", [], [CONTRASTIVE], "predicts no tokens"),
    ("model.last_layer=predicted", [], [CONTRASTIVE], "predicts no tokens"),
    ("optimizer.damping=0.1", [SPARSE], ["optimizer.name=ggt_sparse"], "name=ggt_sparse does not read it"),
    ("optimizer.precondition=model", ["optimizer.name=ggt"], [], "name=adamw does not read it"),
    ("optimizer.error_feedback=false", [SPARSE], ["optimizer.name=mfac"], "name=mfac does not read it"),
    ("optimizer.residual_dtype=fp32", [SPARSE], [SPARSE, "optimizer.error_feedback=false"], "nothing is kept"),
    ("averaging.decay=0.5", ["averaging.method=exponential"], ["averaging.method=last"], "method=last does not read it"),
    ("averaging.keep=9", ["averaging.method=last"], ["averaging.method=exponential"], "method=exponential does not read it"),
    ("averaging.every_steps=2", ["averaging.method=last"], [], "averages nothing; set averaging.method=exponential or last"),
    ("averaging.method=last", [], ["averaging.start_step=10000"], "before the first update of the average"),
    ("averaging.start_step=2", ["averaging.method=exponential"], [], "averaging.method=none averages nothing"),
    ("train.loss_scale=8", ["train.precision=fp16", "system.device=cuda"], [], "train.precision=fp32 has no loss scale"),
    ("checkpoint.async_save=false", ["checkpoint.every_steps=2"], [], "always waits for it; set checkpoint.every_steps"),
    ("run.profile_after=1", ["run.profile=true"], [], "run.profile=false traces no step; set run.profile=true"),
    ("run.profile_steps=1", ["run.profile=true"], [], "run.profile=false traces no step"),
    ("run.profile=true", ["run.profile_after=5"], ["run.profile_after=6"], "lower run.profile_after"),
    ("system.master_port=4711", ["system.ranks_per_node=1"], TWO_NODES, "on 2 nodes, .*; export MASTER_PORT"),
    ("recovery.min_nodes=1", TWO_NODES, ["recovery.min_nodes=2"], "fill 1 node.*set it to at most 1"),
]  # fmt: skip

# Every other setting has an effect in every run, or may have one: that follows from the machine, the data or the launcher
ALWAYS = {
    # A launcher of several runs sets run.folder, and takes its name from results_dir
    "run": ["name", "results_dir", "folder", "tensorboard", "measure_peak_flops", "price_per_kwh", "gco2_per_kwh"],
    # initializer_range is also written into the final model's config.json
    "model": [
        "vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions", "type_vocab_size",
        "hidden_dropout", "attention_dropout", "layer_norm_eps", "initializer_range", "activation", "attention_backend",
    ],
    "data": ["train", "max_seq_len", "vocab_sha256", "allow_shared_text", "scrub_mb_per_s"],
    "batch": ["global_batch_size", "micro_batch_size", "gradient_accumulation_steps", "virtual_ranks", "shape_multiple"],
    "balance": ["strategy", "cost", "prefetch"],
    # At one rank some have nothing to do, but the number of ranks is no reason to refuse a config
    "communication": ["engine", "clip", "shard_optimizer", "reduce_dtype", "backend", "timeout_s"],
    "memory": ["recompute", "release_gradients", "offload_activations"],
    "optimizer": ["name", "lr", "weight_decay", "step_per_bucket"],
    "schedule": ["total_steps", "decay"],
    "train": [
        "seed", "objective", "precision", "compile", "cuda_graphs", "max_steps", "warmup_batches", "log_every_steps",
        "max_skipped_steps", "deterministic",
    ],
    "evaluation": [
        "data", "num_samples", "sha256", "batch_size", "every_samples", "start_samples", "at_start", "target_accuracy",
    ],
    # A run that is stopped writes a checkpoint whatever every_steps says
    "checkpoint": ["init_from", "every_steps", "keep_last", "timeout_s", "save_final_model"],
    "system": ["device", "world_size", "ranks_per_node", "threads_per_rank", "bind_cores", "machine_file", "preflight"],
    # A job under Slurm replaces a node that does not answer at its first start too, without any restart
    "recovery": ["max_restarts", "spare_nodes"],
    # A switch: what describes the submission stays in the file where the log is switched off
    "mlperf": [
        "enabled", "division", "ruleset", "organization", "platform", "status", "poc_name", "poc_email", "clear_caches",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("setting", "with_effect", "without", "reason"), CASES)
def test_a_setting_without_effect_is_refused(
    make_config: Callable[..., Config], setting: str, with_effect: list[str], without: list[str], reason: str
) -> None:
    field = setting.partition("=")[0]
    make_config(setting, *with_effect)
    with pytest.raises(UserError, match=rf"{field}=\S.* has no effect: .*{reason}") as refused:
        make_config(setting, *without)
    assert f"or leave {field} at its default (" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_field_is_said_to_have_an_effect_or_has_a_rule() -> None:
    fields = {f"{section}.{name}" for section, model in sections().items() for name in model.model_fields}
    always = {f"{section}.{name}" for section, names in ALWAYS.items() for name in names}
    ruled = {field for rule in RULES for field in rule.fields}
    assert always | ruled == fields
    assert not always & ruled


def test_every_rule_has_a_case() -> None:
    assert {field for rule in RULES for field in rule.fields} == {setting.partition("=")[0] for setting, *_ in CASES}


@pytest.mark.parametrize(
    "overrides", [(), (PACKED,), (STRATIFIED, "balance.strata=[8, 32]"), ("communication.clip=none",)]
)
def test_a_config_with_all_its_defaults_loads(make_config: Callable[..., Config], overrides: tuple[str, ...]) -> None:
    config = make_config(*overrides)
    assert config_from_tree(as_plain(config)) == config


def test_all_idle_settings_are_named_on_one_line(make_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError) as refused:
        make_config(
            "balance.num_packs=4", "run.profile_after=9", "communication.clip_groups={a: x}", "communication.clip=none"
        )
    text = str(refused.value)
    for part in ("balance.num_packs=4 has", "run.profile_after=9 has", 'communication.clip_groups={"a": "x"} has'):
        assert part in text
    assert "\n" not in text
