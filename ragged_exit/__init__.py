"""Early-exit encoders that are fast in batches. The public names, and nothing else."""

from ragged_exit.accelerate import AcceleratedModel, RowResult, accelerate
from ragged_exit.batch import RaggedBatch
from ragged_exit.executor import ExitRecord, RaggedExecutor, Stage
from ragged_exit.heads import HeadOutput, MlpHead
from ragged_exit.models.base import EarlyExitModel
from ragged_exit.models.deebert import DeeBert
from ragged_exit.models.loading import load
from ragged_exit.outputs import ExitOutput
from ragged_exit.rules import (
    ConfidentPatience,
    DistanceEntropy,
    Energy,
    Entropy,
    ExitRule,
    LearnedUncertainty,
    MaxProb,
    Patience,
)

__version__ = "0.1.0"
__all__ = [
    "AcceleratedModel",
    "ConfidentPatience",
    "DeeBert",
    "DistanceEntropy",
    "EarlyExitModel",
    "Energy",
    "Entropy",
    "ExitOutput",
    "ExitRecord",
    "ExitRule",
    "HeadOutput",
    "LearnedUncertainty",
    "MaxProb",
    "MlpHead",
    "Patience",
    "RaggedBatch",
    "RaggedExecutor",
    "RowResult",
    "Stage",
    "accelerate",
    "load",
]
