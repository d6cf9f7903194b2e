"""MLPerf's rules for BERT as code: what the closed division requires, and where a config breaks it."""

from __future__ import annotations

from bert_fast.config import Config
from bert_fast.config.choices import CLIP_MODES, STRATEGIES
from bert_fast.errors import UserError
from bert_fast.integers import round_up

RULESET = "5.0.0"  # the last with BERT
TARGET_ACCURACY = 0.720
EVALUATION_SAMPLES = 10_000
INIT_LIMIT_S = {"closed": 30 * 60, "open": 240 * 60}  # from init_start to init_stop
_RULESETS_WITH_TENSORS = ("1.1.0", "2.0.0", "2.1.0")
_SHAPE = {
    "hidden_size": 1024,
    "num_layers": 24,
    "num_heads": 16,
    "intermediate_size": 4096,
    "max_positions": 512,
    "type_vocab_size": 2,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
}
_VOCABULARIES = (30_522, 30_528)  # as published, and padded to a multiple of 64


def evaluation_interval(global_batch_size: int) -> int:
    """Samples between evaluations in the closed division: floor(0.05 (230.23 GBS + 3,000,000) / 25,000) 25,000."""
    return int(0.05 * (230.23 * global_batch_size + 3_000_000) // 25_000) * 25_000


def wants_tensors(ruleset: str) -> bool:
    """Whether a closed log of this ruleset names every tensor that was initialized."""
    return ruleset in _RULESETS_WITH_TENSORS


def wants_short_status(ruleset: str) -> bool:
    """Whether submission_status is one word (up to 4.0.0)."""
    return tuple(int(part) for part in ruleset.split(".")[:2]) <= (4, 0)


def check_init_time(seconds: float, division: str) -> None:
    """Refuse a run, before its clock starts, whose initialization took longer than its division allows. Raises UserError."""
    if seconds > INIT_LIMIT_S[division]:
        raise UserError(
            f"initialisation took {seconds / 60:.0f} minutes and mlperf.division={division} allows "
            f"{INIT_LIMIT_S[division] / 60:.0f}; set train.compile=false or communication.bucket_mb to a number, or "
            "mlperf.enabled=false"
        )


def open_because(config: Config) -> list[str]:
    """Settings of a config that the closed division does not allow, one sentence each; empty if it may be closed.

    Free in the closed division: global batch, learning rate, epsilon, training and warm-up steps, start_warmup_step, betas
    and weight decay; order, sharding and batching of samples that stays random overall.
    """
    optimizer, schedule, data, evaluation = config.optimizer, config.schedule, config.data, config.evaluation
    communication, batch, checkpoint = config.communication, config.batch.global_batch_size, config.checkpoint
    found: list[str] = []

    def must(setting: str, holds: bool, rule: str) -> None:
        if not holds:
            section, name = setting.split(".")
            value = getattr(getattr(config, section), name)
            found.append(f"{setting}={str(value).lower() if isinstance(value, bool) else value}: {rule}")

    must("optimizer.name", optimizer.name == "lamb", "the optimizer is LAMB")
    for name, value in _SHAPE.items():
        must(f"model.{name}", getattr(config.model, name) == value, f"the model is BERT-large with {name} {value}")
    in_vocabulary = config.model.vocab_size in _VOCABULARIES
    must("model.vocab_size", in_vocabulary, "the vocabulary has 30,522 tokens, or 30,528 padded")
    must("data.max_seq_len", data.max_seq_len == 512, "samples have up to 512 tokens")
    is_whole_set = evaluation.num_samples == EVALUATION_SAMPLES
    must("evaluation.num_samples", is_whole_set, "the evaluation set has 10,000 samples")
    must("model.layer_norm_eps", config.model.layer_norm_eps == 1e-12, "the model is the reference's, with 1e-12")
    is_random = not STRATEGIES[config.balance.strategy].draws_by_rank
    rule = "every sample is as likely in every batch; strata fix how many of each length"
    must("balance.strategy", is_random, rule)
    must("evaluation.at_start", not evaluation.at_start, "evaluations are at the interval, none before the first")
    must("data.allow_shared_text", not data.allow_shared_text, "the evaluation set is held out of training")
    must("data.dynamic_masking", not data.dynamic_masking, "masks are those of the given samples")
    rule = "a rank's whole gradient or the averaged one is clipped; per group is not the reference's mathematics"
    must("communication.clip", CLIP_MODES[communication.clip].clips == "gradient", rule)
    must("communication.max_norm", communication.max_norm == 1.0, "gradients are clipped at norm 1")
    must("data.mask_fraction", data.mask_fraction is None, "masks are those of the given samples")
    must("model.next_sentence", config.model.next_sentence, "the loss is of masked tokens and of next sentences")
    must("optimizer.trust", optimizer.trust == "tensor", "LAMB has a trust ratio for each tensor")
    must("averaging.method", config.averaging.method == "none", "the weights of the last step are evaluated")
    must("schedule.decay", schedule.decay == "polynomial", "the learning rate decays as a polynomial")
    must("schedule.decay_from", schedule.decay_from == "start", "the decay counts from step 0")
    must("schedule.power", schedule.power == 1.0, "the learning rate decays linearly")
    must("schedule.end_lr", schedule.end_lr == 0.0, "the learning rate decays to 0")
    if checkpoint.init_from is None:
        found.append("checkpoint.init_from is not set: training starts from the given checkpoint")
    has_target = evaluation.target_accuracy == TARGET_ACCURACY
    must("evaluation.target_accuracy", has_target, f"the target is {TARGET_ACCURACY}")
    interval = evaluation_interval(batch)
    whole = round_up(interval, batch)
    rule = f"with a global batch of {batch:,}, evaluations are every {interval:,} samples, or {whole:,}, whole batches"
    must("evaluation.every_samples", evaluation.every_samples in (interval, whole), rule)
    must("evaluation.start_samples", evaluation.start_samples in (None, interval, whole), rule)
    return found


def check_evaluation_set(num_samples: int, config: Config) -> None:
    """Refuse a closed run whose evaluation store is too small. Raises UserError."""
    if config.mlperf.enabled and config.mlperf.division == "closed" and num_samples < EVALUATION_SAMPLES:
        raise UserError(
            f"mlperf.division=closed: the evaluation store {config.evaluation.data} has {num_samples:,} samples and the "
            f"rule is {EVALUATION_SAMPLES:,}; import the whole set"
        )


def check_division(config: Config) -> None:
    """Refuse a config that claims the closed division and breaks its rules. Raises UserError naming them."""
    if config.mlperf.division != "closed":
        return
    reasons = open_because(config)
    if reasons:
        more = f" ({len(reasons) - 1} more: {'; '.join(reasons[1:])})" if len(reasons) > 1 else ""
        raise UserError(f"mlperf.division=closed: {reasons[0]}{more}; change it or set mlperf.division=open")
