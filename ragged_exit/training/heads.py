"""DeeBERT's second stage: fit the heads on a frozen backbone, from features computed once."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from ragged_exit.accelerate import accelerate
from ragged_exit.models.deebert import DeeBert
from ragged_exit.models.highway import Highway
from ragged_exit.training.features import Sequences, pooled_features


def fit_heads(
    model: DeeBert,
    train: tuple[Sequences, Sequence[int] | Sequence[float]],
    valid: tuple[Sequences, Sequence[int] | Sequence[float]],
    *,
    fit_final: bool,
    seed: int = 42,
    epochs: int = 40,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    early_stop: int = 4,
    show_progress: bool = True,
) -> dict[str, float]:
    """Fit every highway (and the final head with ``fit_final``) of ``model`` in place; the backbone stays as it is.

    train, valid: (token id sequences, labels). The loss is the unweighted sum of the heads' losses (Xin et al. 2020,
    section 3.2); fitting stops when the validation loss has not improved for ``early_stop`` epochs, and the best
    epoch's weights stay. Returns each layer's accuracy (or mean squared error) on the validation part.
    """
    set_seed(seed)
    heads = _Heads(model, fit_final)
    encoder = accelerate(model).encoder
    sets = [
        TensorDataset(_features(encoder, model.pooling, sequences, name, show_progress), _labels(model, labels))
        for name, (sequences, labels) in (("train", train), ("valid", valid))
    ]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=heads,
            args=TrainingArguments(
                output_dir=scratch,
                seed=seed,
                num_train_epochs=epochs,
                per_device_train_batch_size=batch_size,
                per_device_eval_batch_size=1024,
                learning_rate=learning_rate,
                lr_scheduler_type="linear",
                eval_strategy="epoch",
                save_strategy="best",
                load_best_model_at_end=True,
                metric_for_best_model="eval_loss",
                greater_is_better=False,
                save_total_limit=1,
                report_to=[],
                logging_strategy="no",
                disable_tqdm=True,  # ours is one line for all epochs
                use_cpu=model.device.type == "cpu",
                dataloader_pin_memory=False,
            ),
            train_dataset=sets[0],
            eval_dataset=sets[1],
            data_collator=_collate,
            callbacks=[EarlyStoppingCallback(early_stop), _EpochBar(show_progress)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    heads.eval()
    features, labels = sets[1].tensors
    with torch.no_grad():
        outputs = heads(features.to(model.device))["logits"]
    return {f"layer_{layer + 1}": _quality(outputs[:, layer].cpu(), labels) for layer in range(outputs.shape[1])}


class _Heads(nn.Module):
    """All heads of a model as one trainable module on features ``[B, L, H]``; layer L's place is the final head's."""

    def __init__(self, model: DeeBert, fit_final: bool) -> None:
        super().__init__()
        # the last highway is never trained in the original, and never asked without exit_at_last_highway
        self.heads = nn.ModuleList([*list(model.highways)[:-1], model.final])
        model.final.requires_grad_(fit_final)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        outputs = [_logits(head, features[:, layer]) for layer, head in enumerate(self.heads)]  # type: ignore[arg-type]
        logits = torch.stack(outputs, 1)  # [B, L, C]
        if labels is None:
            return {"logits": logits}
        return {"loss": torch.stack([_loss(output, labels) for output in outputs]).sum(), "logits": logits}


class _EpochBar(TrainerCallback):
    """One progress bar over the epochs, with the validation loss beside it."""

    def __init__(self, show: bool) -> None:
        self.progress = Progress(disable=not show)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.progress.start()
        self.task = self.progress.add_task("fitting heads", total=args.num_train_epochs)

    def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:
        description = f"fitting heads, validation loss {metrics['eval_loss']:.3f}"
        self.progress.update(self.task, completed=state.epoch, description=description)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.progress.update(self.task, completed=args.num_train_epochs)
        self.progress.stop()


def _logits(head: Highway, pooled: Tensor) -> Tensor:
    """A pooled row ``[H]`` is a sequence of one token to the head: pooled ``[B, H]`` -> ``[B, C]``."""
    return head(pooled[:, None], pooled.new_ones(len(pooled), 1), "cls")


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(logits[:, 0], labels) if logits.shape[1] == 1 else F.cross_entropy(logits, labels)


def _quality(logits: Tensor, labels: Tensor) -> float:
    if logits.shape[1] == 1:
        return float(F.mse_loss(logits[:, 0], labels))
    return float((logits.argmax(1) == labels).float().mean())


def _labels(model: DeeBert, labels: Sequence[int] | Sequence[float]) -> Tensor:
    return torch.tensor(labels, dtype=torch.float32 if model.config.num_labels == 1 else torch.int64)


def _collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {"features": torch.stack([row[0] for row in rows]), "labels": torch.stack([row[1] for row in rows])}


def _features(encoder, pooling: str, sequences: Sequences, name: str, show_progress: bool) -> Tensor:
    with Progress(disable=not show_progress) as progress:
        task = progress.add_task(f"features of {len(sequences):,} {name} rows", total=len(sequences))
        return pooled_features(encoder, sequences, pooling=pooling, on_rows=lambda rows: progress.advance(task, rows))
