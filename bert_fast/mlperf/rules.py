"""MLPerf's rules for BERT as code: what the closed division fixes, and what of a config breaks it."""

from __future__ import annotations

from bert_fast.config import Config
from bert_fast.errors import UserError

RULESET = "5.0.0"  # BERT's last: later rulesets no longer admit it
TARGET_ACCURACY = 0.720
EVALUATION_SAMPLES = 10_000
INIT_LIMIT_S = {"closed": 30 * 60, "open": 240 * 60}  # from init_start to init_stop
_RULESETS_WITH_TENSORS = ("1.1.0", "2.0.0", "2.1.0")
_SHAPE = {
    "hidden_size": 1024, "num_layers": 24, "num_heads": 16, "intermediate_size": 4096, "max_positions": 512,
    "type_vocab_size": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1,
}  # fmt: skip
_VOCABULARIES = (30_522, 30_528)  # as published, and padded to a multiple of 64
_CLIPS = ("global_before_reduce", "global_after_reduce")


def evaluation_interval(global_batch_size: int) -> int:
    """Samples between evaluations in the closed division: floor(0.05 (230.23 GBS + 3,000,000) / 25,000) 25,000."""
    return int(0.05 * (230.23 * global_batch_size + 3_000_000) // 25_000) * 25_000


def wants_tensors(ruleset: str) -> bool:
    """Whether a closed log of this ruleset names every tensor that was initialised."""
    return ruleset in _RULESETS_WITH_TENSORS


def wants_short_status(ruleset: str) -> bool:
    """Whether submission_status is one word (up to 4.0.0)."""
    return tuple(int(part) for part in ruleset.split(".")[:2]) <= (4, 0)


def check_init_time(seconds: float, division: str) -> None:
    """Refuse a run whose initialisation took longer than its division allows, before its clock starts."""
    if seconds > INIT_LIMIT_S[division]:
        raise UserError(
            f"initialisation took {seconds / 60:.0f} minutes and mlperf.division={division} allows "
            f"{INIT_LIMIT_S[division] / 60:.0f}; set train.compile=false or communication.bucket_mb to a number, or "
            "mlperf.enabled=false"
        )


def open_because(config: Config) -> list[str]:
    """What of a config the closed division does not allow, a sentence each; empty if it may be closed.

    Free in the closed division: global batch, learning rate, epsilon, training and warm-up steps, start_warmup_step, betas
    and weight decay; order, sharding and batching of samples that stays random overall.
    """
    optimizer, schedule, data, evaluation = config.optimizer, config.schedule, config.data, config.evaluation
    communication, batch, checkpoint = config.communication, config.batch.global_batch_size, config.checkpoint
    found = []

    def must(holds: bool, what: str, rule: str) -> None:
        if not holds:
            found.append(f"{what}: {rule}")

    must(optimizer.name == "lamb", f"optimizer.name={optimizer.name}", "the optimizer is LAMB")
    for name, value in _SHAPE.items():
        own = getattr(config.model, name)
        must(own == value, f"model.{name}={own}", f"the model is BERT-large with {name} {value}")
    vocabulary = config.model.vocab_size
    must(
        vocabulary in _VOCABULARIES,
        f"model.vocab_size={vocabulary}",
        "the vocabulary has 30,522 tokens, or 30,528 padded",
    )
    must(data.max_seq_len == 512, f"data.max_seq_len={data.max_seq_len}", "samples have up to 512 tokens")
    must(
        evaluation.num_samples == EVALUATION_SAMPLES, f"evaluation.num_samples={evaluation.num_samples}",
        "the evaluation set has 10,000 samples",
    )  # fmt: skip
    must(
        config.model.layer_norm_eps == 1e-12, f"model.layer_norm_eps={config.model.layer_norm_eps:g}",
        "the model is the reference's, with 1e-12",
    )  # fmt: skip
    must(
        config.balance.strategy != "stratified_presort", "balance.strategy=stratified_presort",
        "every sample is as likely in every batch; strata fix how many of each length",
    )  # fmt: skip
    must(not evaluation.at_start, "evaluation.at_start=true", "evaluations are at the interval, none before the first")
    must(not data.allow_shared_text, "data.allow_shared_text=true", "the evaluation set is held out of training")
    must(not data.dynamic_masking, "data.dynamic_masking=true", "masks are those of the given samples")
    must(
        communication.clip in _CLIPS, f"communication.clip={communication.clip}",
        "a rank's whole gradient or the averaged one is clipped; per group is not the reference's mathematics",
    )  # fmt: skip
    must(
        communication.max_norm == 1.0,
        f"communication.max_norm={communication.max_norm}",
        "gradients are clipped at norm 1",
    )
    must(schedule.power == 1.0, f"schedule.power={schedule.power}", "the learning rate decays linearly")
    must(schedule.end_lr == 0.0, f"schedule.end_lr={schedule.end_lr}", "the learning rate decays to 0")
    must(
        checkpoint.init_from is not None,
        "checkpoint.init_from is not set",
        "training starts from the given checkpoint",
    )
    must(
        evaluation.target_accuracy == TARGET_ACCURACY, f"evaluation.target_accuracy={evaluation.target_accuracy}",
        f"the target is {TARGET_ACCURACY}",
    )  # fmt: skip
    interval = evaluation_interval(batch)
    whole = -(-interval // batch) * batch
    for name in ("every_samples", "start_samples"):
        own = getattr(evaluation, name)
        must(
            own in (interval, whole) or (own is None and name == "start_samples"), f"evaluation.{name}={own}",
            f"with a global batch of {batch:,}, evaluations are every {interval:,} samples, or {whole:,}, whole batches",
        )  # fmt: skip
    return found


def check_evaluation_set(num_samples: int, config: Config) -> None:
    """Refuse a closed run whose evaluation store is too small. Raises UserError."""
    if config.mlperf.enabled and config.mlperf.division == "closed" and num_samples < EVALUATION_SAMPLES:
        raise UserError(
            f"mlperf.division=closed: the evaluation store {config.evaluation.data} has {num_samples:,} samples and the rule "
            f"is {EVALUATION_SAMPLES:,}; import the whole set"
        )


def check_division(config: Config) -> None:
    """Refuse a config that claims the closed division and breaks a rule of it. Raises UserError naming the rules."""
    if config.mlperf.division != "closed":
        return
    reasons = open_because(config)
    if reasons:
        more = f" ({len(reasons) - 1} more: {'; '.join(reasons[1:])})" if len(reasons) > 1 else ""
        raise UserError(f"mlperf.division=closed: {reasons[0]}{more}; change it or set mlperf.division=open")
