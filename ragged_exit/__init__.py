"""Early-exit encoders that are fast in batches. The public names, and nothing else."""

from ragged_exit.accelerate import AcceleratedModel, RowResult, accelerate
from ragged_exit.batch import RaggedBatch
from ragged_exit.executor import ExitRecord, RaggedExecutor, Stage
from ragged_exit.heads import HeadOutput, MlpHead
from ragged_exit.models.base import EarlyExitModel
from ragged_exit.models.berxit import Berxit
from ragged_exit.models.cascade import CascadeBert
from ragged_exit.models.de3bert import De3Bert
from ragged_exit.models.deebert import DeeBert
from ragged_exit.models.elasticbert import ElasticBert
from ragged_exit.models.fastbert import FastBert
from ragged_exit.models.full_depth import FullDepth, truncated
from ragged_exit.models.layered import LayeredModel, LayerExit
from ragged_exit.models.loading import load
from ragged_exit.models.pabee import Pabee
from ragged_exit.online import UcbMaxProb
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
    "Berxit",
    "CascadeBert",
    "ConfidentPatience",
    "De3Bert",
    "DeeBert",
    "DistanceEntropy",
    "EarlyExitModel",
    "ElasticBert",
    "Energy",
    "Entropy",
    "ExitOutput",
    "ExitRecord",
    "ExitRule",
    "FastBert",
    "FullDepth",
    "HeadOutput",
    "LayerExit",
    "LayeredModel",
    "LearnedUncertainty",
    "MaxProb",
    "MlpHead",
    "Pabee",
    "Patience",
    "RaggedBatch",
    "RaggedExecutor",
    "RowResult",
    "Stage",
    "UcbMaxProb",
    "accelerate",
    "load",
    "truncated",
]
