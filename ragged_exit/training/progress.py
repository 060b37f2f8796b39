"""One progress bar a phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import Progress
from transformers import TrainerCallback


class PhaseBar(TrainerCallback):
    """Steps done, and the validation loss beside them."""

    def __init__(self, name: str, show: bool) -> None:
        self.name, self.progress = name, Progress(disable=not show)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.progress.start()
        self.task = self.progress.add_task(self.name, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:
        self.progress.update(self.task, description=f"{self.name}, validation loss {metrics['eval_loss']:.3f}")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.progress.stop()


@contextmanager
def track_rows(description: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar over rows; yields what advances it."""
    with Progress(disable=not show) as progress:
        task = progress.add_task(description, total=total)
        yield lambda rows: progress.advance(task, rows)
