"""fit: train an early-exit model by its system's recipe, on transformers' Trainer; it resumes."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from ragged_exit.accelerate import accelerate
from ragged_exit.claims import read_claim, write_claim
from ragged_exit.examples import Examples
from ragged_exit.models.base import ExitPoint
from ragged_exit.models.highway import MlpExit
from ragged_exit.models.layered import LayeredModel
from ragged_exit.training.features import pooled_features
from ragged_exit.training.phases import HEADS_ONLY, Batch, Phase, Schedule
from ragged_exit.training.progress import PhaseBar, track_rows
from ragged_exit.training.recipes import phases_of
from ragged_exit.training.rows import FeatureRows, TokenRows, collate

_START = "start.safetensors"


def fit(
    model: LayeredModel,
    train: Examples,
    valid: Examples,
    *,
    freeze_backbone: bool = False,
    epochs: int | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    hard: Tensor | None = None,
    seed: int = 42,
    bf16: bool = False,
    work_dir: str | Path | None = None,
    show_progress: bool = True,
) -> None:
    """Train ``model`` in place by its system's recipe (``training.recipes``); it comes back in eval mode.

    freeze_backbone: only heads train. epochs, batch_size: instead of the recipe's, in the phases that run the backbone.
    learning_rate: in those that train it. When it is frozen, all three hold for all phases. hard: bool ``[N]``, the
    training rows that were found difficult, for a cascade's first member. bf16: autocast the phases that run the
    backbone. work_dir: keep a checkpoint an epoch there, and go on from it when called again with the same arguments.

    Where the backbone is frozen and the exits are pooled MLPs, they train on features computed once, until the
    validation loss stops falling. A regression's fresh heads start at the mean of the training labels. Raises
    ValueError when ``work_dir`` holds another run's work or files of somebody else, or labels do not fit, and for a
    model that is not in float32, whose weights would swallow the steps.
    """
    dtypes = {weight.dtype for weight in model.parameters()}
    if dtypes != {torch.float32}:
        found = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"model: expected float32 weights, got {found}; bf16=True autocasts")
    labels = [part.label_tensor(model.config.num_labels) for part in (train, valid)]
    if model.config.num_labels == 1:
        _start_at(float(labels[0].mean()), model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch if work_dir is None else work_dir)
        settings = [freeze_backbone, epochs, learning_rate, batch_size, seed, bf16]
        rows = (_plain(train), _plain(valid), None if hard is None else hard.tolist())
        _claim(folder, model, repr((model.section(), _config(model), _digest(model.backbone), settings, rows)))
        for number, phase in enumerate(phases_of(model)):
            parts = [part for part in phase.parts(model) if not (freeze_backbone and part is model.backbone)]
            if not any(True for part in parts for _ in part.parameters()):
                continue  # a model of one exit has none below it
            training = _Training(model, phase, parts)
            schedule = HEADS_ONLY if training.on_features else phase.schedule
            if freeze_backbone or not training.on_features:
                rate = learning_rate if freeze_backbone or not training.backbone_frozen else None
                schedule = schedule.changed(epochs, rate, batch_size)
            done = folder / f"{number}-{phase.name}.safetensors"
            if done.is_file():
                training.load_state_dict(load_file(done))
                continue
            set_seed(seed)
            sets = [
                _rows(training, examples, part_labels, {} if extra is None else {"hard": extra}, show_progress)
                for examples, part_labels, extra in ((train, labels[0], hard), (valid, labels[1], None))
            ]
            hooks = phase.hooks(model)
            try:
                _train(training, schedule, sets, done.with_suffix(""), seed, bf16, show_progress)
            finally:  # interrupted, too: they would stay on the caller's model
                for hook in hooks:
                    hook.remove()
            save_file(training.state_dict(), done)
    model.eval().requires_grad_(True)


class _Training(nn.Module):
    """A phase as Trainer sees it: a module that holds only what trains, and turns a batch into a loss."""

    def __init__(self, model: LayeredModel, phase: Phase, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.whole = (model,)  # in a tuple: no submodule, so that a checkpoint holds the parts only
        self.phase = phase
        self.step = 0  # within the epoch
        self.backbone_frozen = all(part is not model.backbone for part in parts)
        pooled = all(isinstance(exit_.head, MlpExit) for exit_ in model.layer_exits())
        self.on_features = self.backbone_frozen and pooled
        model.requires_grad_(False)
        self.parts.requires_grad_(True)

    def train(self, mode: bool = True) -> _Training:
        self.whole[0].eval()  # what is frozen has no dropout
        super().train(mode)
        return self

    def forward(  # named arguments only: Trainer adds its own to a **kwargs
        self,
        labels: Tensor,
        hard: Tensor | None = None,
        features: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        model = self.whole[0]
        if features is not None:
            points = self._points_on(features)
        else:
            assert input_ids is not None and attention_mask is not None
            points = model.exit_points(input_ids, attention_mask, token_type_ids)
        loss = self.phase.loss(model, Batch(points, labels, self.step if self.training else None, hard))
        self.step += self.training
        return {"loss": loss}

    def _points_on(self, features: Tensor) -> list[ExitPoint]:
        """features ``[B, L, H]``: to a head, a pooled row ``[H]`` is a sequence of one token."""
        model, mask = self.whole[0], features.new_ones(len(features), 1)
        return [
            ExitPoint(head(features[:, layer - 1, None], mask), model.rule, index, layer, layer)
            for head, layer, index in model.layer_exits()
        ]


class _CountSteps(TrainerCallback):
    """Steps count from an epoch's start, which is also where a checkpoint resumes."""

    def on_epoch_begin(self, args, state, control, model, **kwargs) -> None:
        model.step = 0


def _rows(
    training: _Training, examples: Examples, labels: Tensor, extra: dict[str, Tensor], show_progress: bool
) -> Dataset:
    if not training.on_features:
        return TokenRows(examples, labels, extra)
    model = training.whole[0]
    with track_rows(f"features of {len(examples):,} rows", len(examples), show_progress) as advance:
        features = pooled_features(
            accelerate(model).encoder,
            examples.sequences,
            examples.token_type_ids,
            pooling=model.pooling,
            on_rows=advance,
        )
    return FeatureRows(features, labels, extra)


def _train(
    training: _Training,
    schedule: Schedule,
    sets: list[Dataset],
    folder: Path,
    seed: int,
    bf16: bool,
    show_progress: bool,
) -> None:
    checkpoint = _last_checkpoint(folder)
    if checkpoint is not None and schedule.early_stop is not None:
        best, misses = _best_checkpoint(checkpoint)
        if misses >= schedule.early_stop:  # it had stopped, which a Trainer that resumes does not know
            training.load_state_dict(load_file(best / SAFE_WEIGHTS_NAME))
            return
    model = training.whole[0]
    stops = schedule.early_stop is not None
    callbacks: list[Any] = [_CountSteps(), PhaseBar(f"{model.system}: {training.phase.name}", show_progress)]
    if stops:
        callbacks.append(EarlyStoppingCallback(schedule.early_stop))
    args = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        num_train_epochs=schedule.epochs,
        per_device_train_batch_size=schedule.batch_size,
        per_device_eval_batch_size=max(64, schedule.batch_size),
        learning_rate=schedule.learning_rate,
        weight_decay=schedule.weight_decay,
        lr_scheduler_type="linear",
        warmup_steps=schedule.warmup,
        bf16=bf16 and not training.on_features,
        train_sampling_strategy="random" if training.on_features else "group_by_length",
        remove_unused_columns=False,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=stops,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,  # ours is one line a phase
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=False,
    )
    args._n_gpu = 1  # no replicas: each would count steps and move prototypes of its own
    trainer = Trainer(
        model=training,
        args=args,
        train_dataset=sets[0],
        eval_dataset=sets[1],
        data_collator=collate,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _last_checkpoint(folder: Path) -> Path | None:
    """The latest that is whole: a run that was killed while it saved leaves one without what Trainer writes last."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}") if _is_json(path)]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2])) if whole else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True


def _best_checkpoint(last: Path) -> tuple[Path, int]:
    """Where the weights with the lowest validation loss lie, and how many epochs since then were no better.

    Trainer's state has the path that they were written to: it is brought up to date, for a folder that was moved or is
    called by another name now.
    """
    state = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))
    attributes = state.stateful_callbacks["EarlyStoppingCallback"]["attributes"]
    misses = attributes["early_stopping_patience_counter"]
    if state.best_global_step is None:  # every loss was NaN: Trainer ends with the last weights then
        return last, misses
    best = last.with_name(f"checkpoint-{state.best_global_step}")
    state.best_model_checkpoint = str(best)
    scratch = last / f".{TRAINER_STATE_NAME}"
    state.save_to_json(str(scratch))
    scratch.replace(last / TRAINER_STATE_NAME)
    return best, misses


def _start_at(mean: float, model: LayeredModel) -> None:
    """Let heads that were never trained answer about ``mean``.

    From 0, a common error larger than the labels' spread bends the whole backbone first: with BERxiT's alternating
    losses on STS-B it does not recover.
    """
    for exit_ in model.layer_exits():
        bias = getattr(getattr(exit_.head, "classifier", None), "bias", None)
        if bias is not None and not bias.any():
            nn.init.constant_(bias, mean)


def has_progress(folder: Path) -> bool:
    """Whether an epoch or a phase that is done lies anywhere in ``folder``."""
    saved = (path.name for path in folder.rglob("*.safetensors"))
    return any(not name.endswith(_START) for name in saved) or any(folder.rglob("checkpoint-*"))


def _plain(examples: Examples) -> list[Any]:
    """All of it as lists, whose repr leaves nothing out; that of a long array does."""
    rows = [examples.sequences, examples.token_type_ids or []]
    return [None if examples.labels is None else list(examples.labels), [[list(row) for row in each] for each in rows]]


def _config(model: LayeredModel) -> list[tuple[str, Any]]:
    """What may change how it trains (dropout, say), and not where it came from."""
    origin = ("_name_or_path", "transformers_version")
    return sorted((name, value) for name, value in model.config.to_dict().items() if name not in origin)


def _digest(backbone: nn.Module) -> str:
    """Of all weights: an encoder's name and shape do not tell it from another. Fresh heads differ from call to call."""
    digest = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _claim(folder: Path, model: LayeredModel, settings: str) -> None:
    """Start a run in ``folder``, or read the start of the same run there, so that it goes on from equal weights."""
    run = {"system": model.system, "settings": hashlib.sha256(settings.encode()).hexdigest()}
    start = folder / _START
    found = read_claim(folder, run, "work_dir")
    if found == run and start.is_file():
        model.load_state_dict(load_file(start))
        return
    if found is not None and has_progress(folder):
        raise ValueError(f"work_dir: {folder} holds a run with other arguments; give another folder or delete it")
    start.unlink(missing_ok=True)  # of a run that did nothing
    write_claim(folder, run)
    scratch = folder / f".{_START}"
    save_file({name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}, scratch)
    scratch.replace(start)
