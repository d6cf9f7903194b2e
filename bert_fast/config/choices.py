"""The variants of everything a config can choose by name. One table per kind; a new variant is one file and one entry here.

An entry says where the variant is (`module:attribute`, imported when it is chosen, so that this module needs none of them),
what it is, for `--help`, and what a config must know of it to be checked. What the attribute must be is said above each
table; CONTRIBUTING.md has the recipes.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic_core import CoreSchema, PydanticCustomError, core_schema


@dataclass(frozen=True)
class Choice:
    """A variant: `where` it is, as `module:attribute`, and what it is, in a few words."""

    where: str
    what: str


@dataclass(frozen=True)
class WindowOfGradients:
    """The last gradients that an optimizer keeps, and what it does if nothing else is set.

    rows:           how many
    residual_dtype: of what compression left out of them
    """

    stored_as: Literal["whole", "sparse", "low_rank"]
    rows: int = 128  # at 1 % of int16 and bf16: 5.1 bytes for each parameter, and 2 of the residual; AdamW has 8
    residual_dtype: Literal["fp32", "bf16", "int4"] = "bf16"


@dataclass(frozen=True)
class OptimizerChoice(Choice):
    """What a run must know of an optimizer before it is built.

    settings:       fields of `optimizer` that this one reads and not every one does
    wire:           the wire format that it goes with, which no other optimizer can have; empty: any of the others
    state_values:   fp32 numbers that it keeps for each parameter; None where they depend on its arguments
    matrix_values:  the same for parameters in the encoder's matrices, where it is another number
    not_per_bucket: why it cannot update a bucket while later ones are on the wire; empty: it can
    not_sharded:    why ranks cannot update parts of tensors; empty: they can
    capturable:     whether a CUDA graph can hold its step
    package:        what must be installed beside torch
    source:         where its rule is from
    window:         of gradients that it keeps, in place of `state_values`; None: none
    """

    settings: tuple[str, ...] = ()
    state_values: float | None = 2.0
    matrix_values: float | None = None
    not_per_bucket: str = ""
    not_sharded: str = ""
    capturable: bool = True
    package: str = ""
    source: str = ""
    wire: str = ""
    window: WindowOfGradients | None = None


_ADAM = ("beta1", "beta2", "eps")
_FEEDBACK = ("error_feedback", "residual_dtype")
_TOP_K = ("density", "block", *_FEEDBACK)
_MFAC, _GGT = ("damping",), ("beta2", "eps")
_WHOLE, _SPARSE, _LOW_RANK = WindowOfGradients("whole"), WindowOfGradients("sparse"), WindowOfGradients("low_rank")
_MFAC_SOURCE, _EFCP = "Frantar et al., arXiv 2107.03356", "Modoranu et al., arXiv 2306.06098"

# A function (named parameters, OptimizerConfig) -> optim.build.RunOptimizer, as bert_fast/optim/adamw.py has it.
OPTIMIZERS = {
    "adamw": OptimizerChoice(
        "bert_fast.optim.adamw:build",
        "torch's fused AdamW",
        settings=(*_ADAM, "use_apex", "state_dtype", "state_on_host"),
        source="Loshchilov and Hutter, arXiv 1711.05101",
    ),
    "adam": OptimizerChoice(
        "bert_fast.optim.adam:build",
        "torch's fused Adam, with weight decay in the gradient (L2)",
        settings=(*_ADAM, "use_apex"),
        source="Kingma and Ba, arXiv 1412.6980",
    ),
    "nadamw": OptimizerChoice(
        "bert_fast.optim.nadamw:build",
        "torch's NAdam with decoupled weight decay",
        settings=_ADAM,
        capturable=False,  # the host waits for the gradient's norm, as torch's NAdam does not read found_inf
        source="Dozat, ICLR 2016 workshop; arXiv 1711.05101",
    ),
    "lamb": OptimizerChoice(
        "bert_fast.optim.lamb:build",
        "LAMB as MLPerf's reference has it",
        settings=(*_ADAM, "trust"),
        source="You et al., arXiv 1904.00962",
    ),
    "muon": OptimizerChoice(
        "bert_fast.optim.muon:build",
        "Muon for the encoder's matrices, AdamW for all else",
        settings=(*_ADAM, "momentum", "nesterov", "newton_schulz_steps", "newton_schulz_dtype", "adjust_lr", "muon_lr"),
        matrix_values=1.0,
        not_sharded="Muon orthogonalizes whole matrices, and a shard is cut without regard to them",
        source="Jordan et al. 2024 (kellerjordan.github.io/posts/muon); adjusted rate of arXiv 2502.16982",
    ),
    "schedule_free": OptimizerChoice(
        "bert_fast.optim.schedule_free:build",
        "schedule-free AdamW: evaluates and saves an average of its weights",
        settings=_ADAM,
        not_per_bucket="the weight of its average is one number for all tensors, which it moves in every call",
        capturable=False,
        package="schedulefree",
        source="Defazio et al., arXiv 2405.15682",
    ),
    **{
        name: OptimizerChoice(
            f"bert_fast.optim.preconditioned:build_{name.partition('_')[0]}",
            what,
            settings=("window", "precondition", "momentum", *settings),
            state_values=None,
            window=window,
            not_per_bucket="its window is of whole layers, and moves on once a step",
            not_sharded="its window is of whole matrices, and a shard is cut without regard to them"
            if name == "mfac_lowrank"
            else "",
            capturable=False,
            source=source,
        )
        for name, window, what, settings, source in (
            (
                "mfac",
                _WHOLE,
                "M-FAC: natural gradient over the last gradients, 4 x window bytes a parameter",
                _MFAC,
                _MFAC_SOURCE,
            ),
            (
                "mfac_sparse",
                _SPARSE,
                "M-FAC over the largest entries of each gradient (EFCP)",
                (*_MFAC, *_TOP_K),
                _EFCP,
            ),
            ("mfac_lowrank", _LOW_RANK, "M-FAC over gradients of low rank (EFCP)", (*_MFAC, "rank", *_FEEDBACK), _EFCP),
            (
                "ggt",
                _WHOLE,
                "GGT: full-matrix Adagrad over the last gradients",
                _GGT,
                "Agarwal et al., arXiv 1806.02958",
            ),
            ("ggt_sparse", _SPARSE, "GGT over the largest entries of each gradient (EFCP)", (*_GGT, *_TOP_K), _EFCP),
        )
    },
    "micro_adam": OptimizerChoice(
        "bert_fast.optim.preconditioned:build_micro_adam",
        "Adam with moments made of the largest entries of the last gradients",
        settings=(*_ADAM, "window", "precondition", *_TOP_K),
        state_values=None,
        window=WindowOfGradients("sparse", rows=10, residual_dtype="int4"),
        not_per_bucket="its window is of whole layers, and moves on once a step",
        capturable=False,
        source="Modoranu et al., arXiv 2405.15593",
    ),
    "onebit_adam": OptimizerChoice(
        "bert_fast.optim.onebit:build",
        "AdamW, and after communication.exact_steps with a frozen second moment and its momentum sent as signs",
        settings=_ADAM,
        not_sharded="its momentum is compressed before ranks have a part of it",
        capturable=False,
        source="Tang et al., arXiv 2102.02888",
        wire="onebit",
    ),
    "onebit_lamb": OptimizerChoice(
        "bert_fast.optim.onebit_lamb:build",
        "LAMB, and after communication.exact_steps with frozen second moment and trust ratios and its momentum sent as signs",
        settings=(*_ADAM, "factor_min", "factor_max"),
        state_values=3.0,
        not_sharded="its momentum is compressed before ranks have a part of it",
        capturable=False,
        source="Li et al., arXiv 2104.06069",
        wire="onebit",
    ),
    "zero_one_adam": OptimizerChoice(
        "bert_fast.optim.zero_one:build",
        "onebit_adam whose second moment learns ever more seldom, with local steps between exchanges",
        settings=_ADAM,
        state_values=4.0,
        not_per_bucket="a local step reduces no bucket, and the next exchange updates all from the weights of the last",
        not_sharded="its momentum is compressed before ranks have a part of it",
        capturable=False,
        source="Lu et al., arXiv 2202.06009",
        wire="zero_one",
    ),
    "pytorch_optimizer": OptimizerChoice(
        "bert_fast.optim.package:build",
        "a class of the package pytorch_optimizer: optimizer.class_name with optimizer.arguments",
        settings=("class_name", "arguments"),
        state_values=None,
        not_per_bucket="the package's optimizers may count their steps for all tensors together",
        not_sharded="the package's optimizers may need whole tensors",
        capturable=False,
        package="pytorch_optimizer",
        source="github.com/kozistr/pytorch_optimizer, which names the paper of each class",
    ),
    "torchao": OptimizerChoice(
        "bert_fast.optim.torchao:build",
        "AdamW of the package torchao with moments in few bits: optimizer.class_name AdamW8bit, AdamW4bit or AdamWFp8",
        settings=(*_ADAM, "class_name"),
        state_values=None,
        not_sharded="torchao keeps a moment in fp32 whose size is no multiple of its block, as a shard's mostly is",
        capturable=False,
        package="torchao",
        source="github.com/pytorch/ao; arXiv 2110.02861 (8 bits), 2309.01507 (4 bits)",
    ),
}


@dataclass(frozen=True)
class AveragingChoice(Choice):
    """`settings`: fields of `averaging` that this method reads.

    copies_setting: the one of them that says how many copies of the weights it keeps; empty: it keeps one
    """

    settings: tuple[str, ...] = ()
    copies_setting: str = ""


# A class (parameters, AveragingConfig) -> optim.averaging.WeightAverage. `none` is no entry: nothing is averaged.
AVERAGES = {
    "exponential": AveragingChoice(
        "bert_fast.optim.averaging:ExponentialAverage", "an exponential moving average", settings=("decay",)
    ),
    "last": AveragingChoice(
        "bert_fast.optim.averaging:LastAverage",
        "the mean of the last few snapshots",
        settings=("keep",),
        copies_setting="keep",
    ),
}


@dataclass(frozen=True)
class DecayChoice(Choice):
    """`settings`: fields of `schedule` that this decay reads and not every one does."""

    settings: tuple[str, ...] = ()


# A function (progress of the decay from 0 to 1, count of the update, ScheduleConfig, base rate) -> rate, as
# bert_fast/optim/schedule.py has it.
DECAYS = {
    "polynomial": DecayChoice(
        "bert_fast.optim.schedule:polynomial",
        "to end_lr at total_steps by a power of what is left (MLPerf's)",
        settings=("decay_from", "end_lr", "power"),
    ),
    "cosine": DecayChoice(
        "bert_fast.optim.schedule:cosine",
        "to end_lr at total_steps by half a cosine",
        settings=("decay_from", "end_lr"),
    ),
    "linear_to_zero": DecayChoice(
        "bert_fast.optim.schedule:linear_to_zero", "to 0 at total_steps in a line", settings=("decay_from",)
    ),
    "warmup_stable_decay": DecayChoice(
        "bert_fast.optim.schedule:warmup_stable_decay",
        "constant, and over the last decay_steps in a line to end_lr at total_steps",
        settings=("end_lr", "decay_steps"),
    ),
    "steps": DecayChoice(
        "bert_fast.optim.schedule:steps", "times gamma at each of the milestones", settings=("milestones", "gamma")
    ),
    "constant": DecayChoice("bert_fast.optim.schedule:constant", "no decay"),
}


@dataclass(frozen=True)
class EngineChoice(Choice):
    """What a run must know of an engine before it is built.

    steps_per_bucket: whether a bucket's weights can be updated while later ones are reduced
    needs_group:      whether it needs a process group, also on one rank
    not_clipped:      why it cannot clip before gradients are reduced; empty: it can
    shards:           whether each rank has a part of weights, gradients and optimizer state
    settings:         fields of `communication` that it reads and not every one does
    """

    steps_per_bucket: bool = False
    needs_group: bool = False
    not_clipped: str = ""
    shards: bool = False
    settings: tuple[str, ...] = ()


_BUCKETS = ("bucket_mb",)

# A subclass of bert_fast.communication.engine.Engine. In SHARDED_ENGINES: what takes its place with
# communication.shard_optimizer, where each rank updates a part of the weights.
ENGINES = {
    "bucketed": EngineChoice(
        "bert_fast.communication.reducer:BucketReducer",
        "our reducer, overlapped with backward",
        steps_per_bucket=True,
        settings=_BUCKETS,
    ),
    "ddp": EngineChoice(
        "bert_fast.communication.ddp:DdpEngine",
        "torch's DistributedDataParallel with the same clipping",
        needs_group=True,
        settings=_BUCKETS,
    ),
    "fsdp": EngineChoice(
        "bert_fast.communication.fsdp:FsdpEngine",
        "torch's fully_shard: weights, gradients and optimizer state in parts",
        needs_group=True,
        not_clipped="torch's hooks reduce a gradient before it can be clipped",
        shards=True,
        settings=("reshard_after_forward", "shard_within_node"),
    ),
}
SHARDED_ENGINES = {
    "bucketed": EngineChoice(
        "bert_fast.communication.sharded:ShardedReducer", "reduce-scatter, update of shards, all-gather"
    ),
}


@dataclass(frozen=True)
class ObjectiveChoice(Choice):
    """What a run must know of an objective beside its class.

    section:   of the config, which the class is given; empty: it takes no argument
    store:     class of its stores
    change:    function from a batch of samples, as stores have them, to the batch that the model is given; empty: the same
    made_up:   the same for batches of random tokens, before the clock
    step:      class of a step
    evaluator: function from store, config, cost model and environment to what evaluates
    export:    function that writes the final model
    on_pairs:  whether a sample is a pair of texts, whose cosines are learned
    """

    section: str = ""
    store: str = "bert_fast.data.store:Store"
    change: str = ""
    made_up: str = ""
    step: str = "bert_fast.train.step:TrainStep"
    evaluator: str = "bert_fast.train.evaluate:make_evaluator"
    export: str = "bert_fast.train.checkpoint.export:export_model"
    on_pairs: bool = False


# A class as bert_fast.model.objective.Objective describes it.
OBJECTIVES: dict[str, ObjectiveChoice] = {
    "mlm_nsp": ObjectiveChoice(
        "bert_fast.model.objective:MlmNsp", "masked-token and next-sentence prediction, as BERT has it"
    ),
    "contrastive": ObjectiveChoice(
        "bert_fast.contrastive.objective:Contrastive",
        "embeddings of pairs of texts: each query chooses its key among those of all pairs (docs/contrastive.md)",
        section="contrastive",
        store="bert_fast.data.pairs.store:PairStore",
        change="bert_fast.data.pairs.batch:texts_of",
        made_up="bert_fast.train.contrastive_step:made_up_pairs",
        step="bert_fast.train.contrastive_step:ContrastiveStep",
        evaluator="bert_fast.train.retrieval:RetrievalEvaluator",
        export="bert_fast.train.checkpoint.export:export_embedding_model",
        on_pairs=True,
    ),
}


@dataclass(frozen=True)
class WireFormatChoice(Choice):
    """What a run must know of a wire format before it is built.

    settings: fields of `communication` that this format reads and not every one does
    is_cast:  it sends the numbers of a bucket in another dtype and keeps nothing, so that any engine can send it, and several
        ranks' can be added up
    not_sharded: why it cannot leave each rank a part of a bucket (`communication.shard_optimizer`); empty: it can
    by_node: whether it is told `ranks_per_node`, to send less between nodes
    sends_sums: whether it also encodes sums, and keeps what that leaves out
    """

    settings: tuple[str, ...] = ()
    is_cast: bool = False
    not_sharded: str = ""
    by_node: bool = False
    sends_sums: bool = False


# A function (dtype of the gradients, scale, and the settings it reads by name) -> WireFormat, as
# bert_fast/communication/casts.py has it.
WIRE_FORMATS = {
    "fp32": WireFormatChoice("bert_fast.communication.casts:fp32", "as they are", is_cast=True),
    "bf16": WireFormatChoice("bert_fast.communication.casts:bf16", "half the bytes, 8 bits of precision", is_cast=True),
    "fp16": WireFormatChoice(
        "bert_fast.communication.casts:fp16", "half the bytes, 11 bits of precision, scaled into range", is_cast=True
    ),
    "int8_ef": WireFormatChoice(
        "bert_fast.communication.compressed:int8_ef",
        "a quarter of the bytes: 8 bits with a scale per block, and error feedback",
        settings=("residual_dtype",),
        by_node=True,
        sends_sums=True,
    ),
    "fp8_ef": WireFormatChoice(
        "bert_fast.communication.compressed:fp8_ef",
        "a quarter of the bytes: FP8 (e4m3) with a scale per block, and error feedback",
        settings=("residual_dtype",),
        by_node=True,
        sends_sums=True,
    ),
    "topk_ef": WireFormatChoice(
        "bert_fast.communication.compressed:topk_ef",
        "the largest entries alone, with error feedback",
        settings=("residual_dtype", "density"),
        by_node=True,
        sends_sums=True,
    ),
    "powersgd": WireFormatChoice(
        "bert_fast.communication.powersgd:powersgd",
        "matrices as products of two thin ones, with error feedback",
        settings=("residual_dtype", "powersgd_rank", "exact_steps"),
        not_sharded="it reduces the factors of whole matrices, and a shard is cut without regard to them",
    ),
    "onebit": WireFormatChoice(
        "bert_fast.communication.onebit:onebit",
        "gradients for exact_steps, then the momentum of onebit_adam or onebit_lamb, a bit for each number",
        settings=("residual_dtype", "exact_steps"),
        not_sharded="the momentum is compressed before ranks have a part of it",
        sends_sums=True,
    ),
    "zero_one": WireFormatChoice(
        "bert_fast.communication.zero_one:zero_one",
        "the momentum of zero_one_adam, a bit for each number, exact ever more seldom, and later not in every step",
        settings=("residual_dtype", "exact_steps", "var_update_scaler", "local_step_scaler", "local_step_clipper"),
        not_sharded="the momentum is compressed before ranks have a part of it",
        sends_sums=True,
    ),
}


@dataclass(frozen=True)
class ClipMode:
    """A way to clip: what has its norm clipped, and whether that happens before gradients are reduced over ranks.

    Engines ask for the properties (`communication.clip` has the arithmetic).
    """

    what: str
    clips: Literal["nothing", "groups", "gradient"]
    before_reduce: bool = False

    @property
    def by_group(self) -> bool:
        """Each clip group of a rank is scaled on its own, so that a bucket must hold whole groups."""
        return self.clips == "groups"

    @property
    def delays_communication(self) -> bool:
        """The norm of a rank's whole gradient is needed first: no bucket can leave before backward has ended."""
        return self.clips == "gradient" and self.before_reduce

    @property
    def after_reduce(self) -> bool:
        """The averaged gradient is scaled, once all of it is there."""
        return self.clips == "gradient" and not self.before_reduce

    @property
    def bounds_sums(self) -> bool:
        """What a rank sends has a norm of at most `max_norm`, and so has the average."""
        return self.clips != "nothing" and self.before_reduce

    @property
    def updates_by_bucket(self) -> bool:
        """A bucket's update is known as soon as that bucket is reduced (`optimizer.step_per_bucket`)."""
        return self.clips != "gradient"


CLIP_MODES = {
    "none": ClipMode("nothing is clipped", "nothing"),
    "global_before_reduce": ClipMode("each rank's whole gradient", "gradient", before_reduce=True),
    "bucket_before_reduce": ClipMode("each clip group of a rank (the paper's, overlaps)", "groups", before_reduce=True),
    "global_after_reduce": ClipMode("the averaged gradient (the textbook's)", "gradient"),
}


@dataclass(frozen=True)
class RecomputeChoice(Choice):
    """What a run must know of a way to recompute before it is planned.

    reads_sizes:  whether its plan follows from bytes and seconds of the model's stages, which are measured first
    of_attention: whether attention alone is computed again, inside of stages that are kept
    """

    reads_sizes: bool = False
    of_attention: bool = False


# A function (memory.remat.Chain, budget in bytes or None) -> memory.remat.Plan, as bert_fast/memory/modes.py has it. `none`
# is no entry: everything is kept.
RECOMPUTE = {
    "attention": RecomputeChoice(
        "bert_fast.memory.modes:none", "scores and probabilities of attention, from its operands", of_attention=True
    ),
    "layer": RecomputeChoice("bert_fast.memory.modes:layer", "each layer, from its input"),
    "half_layer": RecomputeChoice("bert_fast.memory.modes:half_layer", "each half of a layer, from its input"),
    "optimal": RecomputeChoice(
        "bert_fast.memory.modes:optimal", "runs of half layers, so that the peak is least", reads_sizes=True
    ),
    "budget": RecomputeChoice(
        "bert_fast.memory.modes:budget", "as little as memory.budget_gib allows", reads_sizes=True
    ),
}


@dataclass(frozen=True)
class StrategyChoice(Choice):
    """`settings`: fields of `balance` that this strategy reads and not every one does.

    `draws_by_rank`: which samples are in a step depends on how many ranks there are, and not every batch is as likely.
    `pads`: micro-batches are laid out with padding.
    """

    settings: tuple[str, ...] = ()
    draws_by_rank: bool = False
    pads: bool = False


# A subclass of balance.strategies.base.Strategy.
STRATEGIES = {
    "random": StrategyChoice("bert_fast.balance.strategies.as_drawn:Random", "as drawn"),
    "pad_to_longest": StrategyChoice(
        "bert_fast.balance.strategies.as_drawn:PadToLongest",
        "as drawn, padded to the longest of a micro-batch",
        pads=True,
    ),
    "exchange": StrategyChoice("bert_fast.balance.strategies.descending:Exchange", "sorted, assigned in rounds"),
    "exchange_snake": StrategyChoice(
        "bert_fast.balance.strategies.descending:ExchangeSnake", "sorted, assigned in rounds of alternating direction"
    ),
    "stratified_presort": StrategyChoice(
        "bert_fast.balance.strategies.stratified_presort:StratifiedPresort",
        "the paper's: so many samples of each length stratum, sorted within each node",
        settings=("num_strata", "strata", "strata_counts"),
        draws_by_rank=True,
    ),
    "balanced": StrategyChoice(
        "bert_fast.balance.strategies.descending:Balanced",
        "Karmarkar-Karp, refined; every rank the same number of samples",
        settings=("refine_ms",),
    ),
    "balanced_free": StrategyChoice(
        "bert_fast.balance.strategies.balanced_free:BalancedFree",
        "the same with any number of samples per rank",
        settings=("refine_ms", "max_tokens"),
    ),
    "packed": StrategyChoice(
        "bert_fast.balance.strategies.packed:Packed",
        "packed into rows of data.max_seq_len",
        settings=("num_packs", "max_samples_per_pack", "pack_order"),
        pads=True,
    ),
}


@dataclass(frozen=True)
class AttentionChoice(Choice):
    """What a config must know of a way to compute attention.

    has_dropout:         whether it can drop attention probabilities
    keeps_probabilities: whether a GPU keeps them for backward; the others compute them again in one kernel
    """

    has_dropout: bool = True
    keeps_probabilities: bool = False


# A model.attention.backend.Backend. `auto` is no entry: it picks one of these (model.attention.choose_backend).
ATTENTION_BACKENDS = {
    "loop": AttentionChoice(
        "bert_fast.model.attention.rectangles:LOOP", "sequence by sequence; the oracle of all others"
    ),
    "grouped": AttentionChoice("bert_fast.model.attention.rectangles:GROUPED", "neighbours of similar length together"),
    "matmul": AttentionChoice(
        "bert_fast.model.attention.rectangles:MATMUL",
        "the same by plain products; fast on CPUs",
        keeps_probabilities=True,
    ),
    "padded": AttentionChoice("bert_fast.model.attention.rectangles:PADDED", "all padded to the longest"),
    "block_diagonal": AttentionChoice(
        "bert_fast.model.attention.rectangles:BLOCK_DIAGONAL", "packed into rows under a mask"
    ),
    "nested": AttentionChoice("bert_fast.model.attention.nested:NESTED", "torch's nested tensors"),
    "varlen": AttentionChoice(
        "bert_fast.model.attention.flash:VARLEN", "torch's varlen_attn; CUDA, 16 bits", has_dropout=False
    ),
    "torch_flash": AttentionChoice(
        "bert_fast.model.attention.flash:TORCH_FLASH", "the kernel under varlen, with dropout; CUDA, 16 bits"
    ),
    "flex": AttentionChoice("bert_fast.model.attention.flex:FLEX", "FlexAttention, compiled; CUDA", has_dropout=False),
    "flash": AttentionChoice("bert_fast.model.attention.flash:FLASH", "package flash-attn; CUDA, 16 bits"),
}


# An instance of a subclass of data.corpora.base.Corpus.
CORPORA = {
    "pydocs": Choice("bert_fast.data.corpora.pydocs:CORPUS", "documentation strings of Python and installed packages"),
    "prose": Choice(
        "bert_fast.data.corpora.prose:CORPUS", "a folder of .txt, .md and .rst files, one document per file"
    ),
    "mlcommons": Choice("bert_fast.data.corpora.mlcommons:CORPUS", "MLPerf's cleaned shards, one sentence per line"),
    "jsonl": Choice("bert_fast.data.corpora.jsonl:CORPUS", "files of JSON lines, one document per line"),
    "wikiextractor": Choice("bert_fast.data.corpora.wikiextractor:CORPUS", "what WikiExtractor wrote"),
    "mediawiki": Choice("bert_fast.data.corpora.mediawiki:CORPUS", "a dump of Wikipedia, one document per article"),
    "parquet": Choice("bert_fast.data.corpora.parquet:CORPUS", "Parquet files, one document per row"),
}

# An instance of a subclass of data.pairs.sources.base.PairReader.
PAIR_SOURCES = {
    "jsonl": Choice("bert_fast.data.pairs.sources.jsonl:READER", "files of JSON lines, one pair per line"),
    "parquet": Choice("bert_fast.data.pairs.sources.parquet:READER", "Parquet files, one pair per row"),
    "datasets": Choice("bert_fast.data.pairs.sources.datasets:READER", "a folder that `datasets` saved"),
    "dropout": Choice(
        "bert_fast.data.pairs.sources.dropout:READER", "text of a corpus, the same on both sides (SimCSE)"
    ),
    "inverse_cloze": Choice(
        "bert_fast.data.pairs.sources.inverse_cloze:READER", "a sentence of a corpus, and the passage around it"
    ),
    "docstrings": Choice(
        "bert_fast.data.pairs.sources.docstrings:READER", "the first sentence of documentation strings, and the rest"
    ),
}


class Described(Protocol):
    """What an entry of every table has."""

    @property
    def what(self) -> str: ...


class OneOf:
    """Marks a config field whose values are the names of a table. They are checked when a config is read."""

    def __init__(self, table: Mapping[str, Described], also: Mapping[str, str]) -> None:
        self._table, self._also = table, also

    def described(self) -> dict[str, str]:
        """Every value, and what it is."""
        return {**self._also, **{name: entry.what for name, entry in self._table.items()}}

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, core_schema.str_schema())

    def _check(self, name: str) -> str:
        names = list(self.described())
        if name in names:
            return name
        near = difflib.get_close_matches(name[:100], names, n=1)
        guess = f" (did you mean {near[0]}?)" if near else ""
        known = ", ".join(map(repr, names))
        raise PydanticCustomError("one_of", "must be one of {known}{guess}", {"known": known, "guess": guess})


def one_of(table: Mapping[str, Described], also: Mapping[str, str] | None = None) -> OneOf:
    """For a config field: `name: Annotated[str, one_of(OPTIMIZERS)]`.

    Args:
        also: values that are no entries of the table, with what they are.
    """
    return OneOf(table, also or {})


def find(table: Mapping[str, Choice], name: str) -> Any:
    """Import the variant `name` of a table."""
    return attribute(table[name].where)


def attribute(where: str) -> Any:
    """Import what is at `module:attribute`."""
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)
