"""Every setting of a run: typed, validated, frozen. One file per section.

A run is one `Config`, read from YAML with dotted overrides (`bert_fast.config.load`). Field descriptions are the
documentation: `run_pretraining.py --help` prints them with their defaults.
"""

from bert_fast.config.averaging import AveragingConfig
from bert_fast.config.balance import BalanceConfig
from bert_fast.config.batch import BatchConfig
from bert_fast.config.checkpoint import CheckpointConfig
from bert_fast.config.communication import CommunicationConfig
from bert_fast.config.contrastive import ContrastiveConfig
from bert_fast.config.data import DataConfig
from bert_fast.config.evaluation import EvaluationConfig
from bert_fast.config.memory import MemoryConfig
from bert_fast.config.mlperf import MlperfConfig
from bert_fast.config.model import ModelConfig
from bert_fast.config.optimizer import OptimizerConfig
from bert_fast.config.recovery import RecoveryConfig
from bert_fast.config.root import Config, as_plain, sections
from bert_fast.config.run import RunConfig
from bert_fast.config.schedule import ScheduleConfig
from bert_fast.config.section import Section
from bert_fast.config.system import SystemConfig
from bert_fast.config.train import TrainConfig

__all__ = [
    "AveragingConfig",
    "BalanceConfig",
    "BatchConfig",
    "CheckpointConfig",
    "CommunicationConfig",
    "Config",
    "ContrastiveConfig",
    "DataConfig",
    "EvaluationConfig",
    "MemoryConfig",
    "MlperfConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RecoveryConfig",
    "RunConfig",
    "ScheduleConfig",
    "Section",
    "SystemConfig",
    "TrainConfig",
    "as_plain",
    "sections",
]
