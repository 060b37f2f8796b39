"""The words of a recipe: phases, each with a loss, the parts it trains, and a schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ragged_exit.models.base import ExitPoint


class Batch(NamedTuple):
    """What a loss sees of one step.

    points: every exit's output, shallow to deep. labels ``[B]``. step: within the epoch, None in evaluation. hard:
    bool ``[B]`` where difficulty labels were given (CascadeBERT).
    """

    points: list[ExitPoint]
    labels: Tensor
    step: int | None = None
    hard: Tensor | None = None


Loss = Callable[[Any, Batch], Tensor]  # (model, batch) -> scalar


@dataclass(frozen=True)
class Schedule:
    """Adam's hyper-parameters. warmup: share of the steps; then linear decay to zero.

    early_stop: stop when the validation loss has not improved for so many epochs, and keep the best epoch's weights.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    warmup: float = 0.0
    weight_decay: float = 0.0
    early_stop: int | None = None

    def changed(self, epochs: int | None, learning_rate: float | None, batch_size: int | None) -> Schedule:
        """With what the caller wants otherwise."""
        return replace(
            self,
            epochs=self.epochs if epochs is None else epochs,
            learning_rate=self.learning_rate if learning_rate is None else learning_rate,
            batch_size=self.batch_size if batch_size is None else batch_size,
        )


HEADS_ONLY = Schedule(epochs=40, learning_rate=1e-3, batch_size=128, early_stop=4)  # on cached features: seconds


def no_hooks(model: Any) -> list[RemovableHandle]:
    return []


@dataclass(frozen=True)
class Phase:
    """One stage of a recipe.

    parts: the model's modules whose parameters train; all others stay as they are, in eval mode. hooks: installed for
    the phase's duration.
    """

    name: str
    loss: Loss
    parts: Callable[[Any], Sequence[nn.Module]]
    schedule: Schedule
    hooks: Callable[[Any], list[RemovableHandle]] = no_hooks
