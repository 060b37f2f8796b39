"""EarlyExitModel: what all reference systems share - the padded forward, the row-wise exit, saving and loading."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from ragged_exit.batch import check_inputs, kept_tokens
from ragged_exit.encoder import PackedEncoder
from ragged_exit.executor import Lesson, Stage
from ragged_exit.heads import HeadOutput
from ragged_exit.models.checkpoint import WEIGHTS_FILE, load_strictly, read_config, read_state
from ragged_exit.models.uer import UerConfig, UerModel
from ragged_exit.ops.reference import exit_decide
from ragged_exit.outputs import ExitOutput
from ragged_exit.rules import ExitRule, rule_from_dict

IGNORED = -100  # a label that does not count, PyTorch's own default
SYSTEMS: dict[str, type[EarlyExitModel]] = {}  # every system by its name, as config.json has it
EncoderFactory = Callable[[nn.Module], PackedEncoder]


@dataclass(frozen=True)
class ExitPoint:
    """One exit of the padded reference: its head's output and what a row that leaves there reports."""

    output: HeadOutput
    rule: ExitRule
    exit_index: int
    exit_layer: int
    executed_layers: int
    member: int = 1


class EarlyExitModel(nn.Module):
    """A published system as ordinary padded PyTorch: the reference that its accelerated forward must agree with.

    A system implements ``exit_points`` (all its exits on a padded batch), ``stages`` (the same for the executor),
    ``options`` (what its constructor takes besides config and rule) and ``num_exits``.
    """

    system: ClassVar[str]
    offers: ClassVar[frozenset[str]] = frozenset()  # what its heads can give a rule besides logits, see ExitRule.needs

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "system" in cls.__dict__:
            SYSTEMS[cls.system] = cls

    def __init__(self, config: PretrainedConfig, rule: ExitRule) -> None:
        """Raises ValueError for a task with several labels a row: exits compare classes that exclude each other."""
        super().__init__()
        if getattr(config, "problem_type", None) == "multi_label_classification":
            raise ValueError("problem_type: expected one label a row, got 'multi_label_classification'")
        self.config: Any = config
        self.rule = rule

    # what a system implements -------------------------------------------------------------------------------------
    def exit_points(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> list[ExitPoint]:
        """Every exit, shallow to deep, at full depth; the last one answers for whoever is left."""
        raise NotImplementedError

    def stages(self, encoder: EncoderFactory) -> list[Stage]:
        """The executor's list; ``encoder`` turns a backbone into a PackedEncoder, a snapshot.

        An ``MlpHead`` refers to the live weights; any other head is a snapshot, of the encoder's dtype and device.
        """
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """JSON-ready keyword arguments that rebuild this model, besides ``config`` and ``rule``."""
        raise NotImplementedError

    def prepare(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The arguments of a call in Hugging Face's conventions, where a system's own are accepted too."""
        return input_ids, attention_mask, token_type_ids

    def prepare_types(self, token_type_ids: Sequence[int]) -> Sequence[int]:
        """``prepare`` for one sequence without padding: what it gives as token types, as Hugging Face has them."""
        return token_type_ids

    @property
    def num_exits(self) -> int:
        """How many thresholds the rule takes, one an exit."""
        raise NotImplementedError

    def training_loss(self, points: list[ExitPoint], labels: Tensor) -> Tensor:
        """The joint loss of a training step: by default the sum over the exits. Recipes weigh them otherwise."""
        return torch.stack([self.task_loss(point.output.logits, labels) for point in points]).sum()

    # what they share ----------------------------------------------------------------------------------------------
    def check_rule(self, rule: ExitRule) -> None:
        """Raise ValueError when ``rule`` cannot work here: thresholds, classes, or what it needs of the heads.

        Raises TypeError for what is no rule.
        """
        if not isinstance(rule, ExitRule):
            raise TypeError(f"rule: expected an ExitRule, got {type(rule).__name__}")
        rule.check(self.num_exits)
        rule.check_labels(self.config.num_labels)
        if rule.needs and rule.needs not in self.offers:
            raise ValueError(f"rule: {type(rule).__name__} needs heads with {rule.needs}; {self.system} has none")

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of all its parameters. Raises ValueError where they have several."""
        found = {parameter.dtype for parameter in self.parameters()}
        if len(found) > 1:
            raise ValueError(
                f"model: expected parameters of one dtype, or a dtype to accelerate in, got {sorted(map(str, found))}"
            )
        return found.pop()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ExitOutput:
        """Padded ``[B, S]`` in. Training mode runs every exit; eval mode answers each row at its own exit.

        Raises TypeError or ValueError naming the argument, or ``rule`` where one was set that ``check_rule`` refuses.
        """
        self.check_rule(self.rule)  # whoever set it was not asked
        check_inputs(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        input_ids, attention_mask, token_type_ids = self.prepare(input_ids, attention_mask, token_type_ids)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if attention_mask.device.type == "cpu":  # elsewhere the host would wait for the answer
            kept_tokens(attention_mask)
        points = self.exit_points(input_ids, attention_mask, token_type_ids)
        if self.training:
            loss = None if labels is None else self.training_loss(points, labels)
            exit_logits = tuple(point.output.logits for point in points)
            return ExitOutput(loss=loss, logits=exit_logits[-1], exit_logits=exit_logits)
        output = answer(points)
        if labels is not None:  # the loss first, as Hugging Face models return it
            output = ExitOutput(loss=self.task_loss(output.logits, labels), **output)
        return output

    def task_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy with integer labels ``[B]``, or for one output the mean squared error, ``[B]`` or ``[B, 1]``.

        A class of -100 does not count, as in PyTorch. Raises TypeError or ValueError naming ``labels``.
        """
        rows, classes = logits.shape
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels: expected a tensor, got {type(labels).__name__}")
        if labels.shape != (rows,) and (classes > 1 or labels.shape != (rows, 1)):
            raise ValueError(f"labels: expected shape [{rows}], one a row, got {list(labels.shape)}")
        if classes == 1:
            return F.mse_loss(logits[:, 0].float(), labels.float().reshape(rows))
        if labels.is_floating_point():
            raise TypeError(f"labels: expected integers, the classes, got {labels.dtype}")
        if labels.device.type == "cpu":  # elsewhere the host would wait for the answer
            outside = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
            if len(outside):
                raise ValueError(f"labels: expected classes in [0, {classes}), got {int(outside[0])}")
        return F.cross_entropy(logits.float(), labels.long(), ignore_index=IGNORED)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` (with the ``early_exit`` section) and ``model.safetensors``.

        Raises, before anything is written, TypeError or ValueError for a rule that ``check_rule`` refuses.
        """
        config = self.config.to_dict() | {"early_exit": self.section(), "architectures": [type(self).__name__]}
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        # a shared tensor is stored once per name: safetensors refuses aliases
        save_file({name: value.detach().clone().contiguous() for name, value in self.state_dict().items()},
                  path / WEIGHTS_FILE, metadata={"format": "pt"})  # fmt: skip

    def section(self) -> dict[str, Any]:
        """The ``early_exit`` section of config.json, which ``build`` reads. Raises what ``check_rule`` does."""
        self.check_rule(self.rule)
        return {"system": self.system, "rule": self.rule.to_dict(), **self.options()}

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> EarlyExitModel:
        """Read what ``save_pretrained`` wrote, strictly, in eval mode; a base class takes any system.

        Raises FileNotFoundError for a file that is not there, ValueError when the directory holds another system, or
        keys are missing or unexpected (all listed).
        """
        path = Path(directory)
        saved = read_config(path)
        section = saved.get("early_exit")
        wanted = getattr(cls, "system", None)
        if not isinstance(section, dict) or wanted not in (None, section.get("system")):
            raise ValueError(f'{path}: expected a config.json with early_exit.system = "{wanted or "..."}"')
        return read_own(path, saved)


def read_own(path: Path, saved: dict[str, Any]) -> EarlyExitModel:
    """What ``save_pretrained`` wrote in ``path``, strictly, in eval mode; saved: its config.json, with our section."""
    try:
        model = build(saved["early_exit"], saved)
    except ValueError as error:
        raise ValueError(f"{path}/config.json: {error}") from error
    load_strictly(model, read_state(path), path)
    return model.eval()


def build(section: dict[str, Any], saved_config: dict[str, Any]) -> EarlyExitModel:
    """A model with random fp32 weights from what ``section`` wrote and its backbone's config.

    Raises ValueError, naming the field, for a section that ``section`` would not have written.
    """
    if not isinstance(section, dict):
        raise ValueError(f"early_exit: expected an object, got {section!r}")
    options = dict(section)
    system = options.pop("system", None)
    if not isinstance(system, str) or system not in SYSTEMS:
        raise ValueError(f"early_exit.system: expected one of {sorted(SYSTEMS)}, got {system!r}")
    rule = options.pop("rule", {})
    if not isinstance(rule, dict):
        raise ValueError(f"early_exit.rule: expected an object, got {rule!r}")
    config = config_from_dict(saved_config)
    try:
        return SYSTEMS[system](config, rule=rule_from_dict(rule), **options).float()  # whatever torch's default dtype
    except TypeError as error:  # an option that it does not take, or a value of another type
        raise ValueError(f"early_exit: {error}") from error


def answer(points: list[ExitPoint]) -> ExitOutput:
    """Give every row the answer of its exit: the first whose rule lets it go, else the last."""
    rows = points[0].output.logits.shape[0]
    device = points[0].output.logits.device
    cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=device)  # the plan is not used: any lengths do
    live = torch.tensor([rows, rows], dtype=torch.int32, device=device)
    waiting = torch.ones(rows, dtype=torch.bool, device=device)
    chosen: dict[str, Any] = {}
    state: dict[str, Tensor] = {}
    samples = torch.arange(rows, device=device)
    rule: ExitRule | None = None
    thresholds: Tensor | None = None
    lessons: list[Lesson] = []
    for number, point in enumerate(points):
        if point.rule is not rule:
            rule = point.rule
            state = rule.initial_state(rows, device)
            thresholds = rule.start(samples[waiting])
            if thresholds is not None:
                thresholds = waiting.new_zeros(rows, dtype=torch.float32).masked_scatter(waiting, thresholds.to(device))
            if rule.learns and thresholds is not None:
                lessons.append(Lesson(rule, samples[waiting], thresholds[waiting]))
        decided = exit_decide(
            point.output.logits,
            point.output.signal,
            cu_seqlens,
            live,
            state.get("counter"),
            state.get("previous"),
            torch.tensor([rule.threshold_at(point.exit_index)]) if thresholds is None else thresholds,
            rule.spec,
            number == len(points) - 1,
        )
        state = {"counter": decided.counter, "previous": decided.previous}
        if lessons and lessons[-1].rule is rule:
            lessons[-1].note(point.exit_index, samples[waiting], decided.score[waiting])
        here = waiting & decided.exits
        waiting = waiting & ~here
        values = {
            "logits": decided.logits,
            "score": decided.score.float(),
            "exit_layer": torch.full((rows,), point.exit_layer, device=device),
            "exit_member": torch.full((rows,), point.member, device=device),
            "executed_layers": torch.full((rows,), point.executed_layers, device=device),
        }
        for name, value in values.items():
            mask = here.view(-1, *[1] * (value.ndim - 1))
            chosen[name] = torch.where(mask, value, chosen.get(name, torch.zeros_like(value)))
    for lesson in lessons:
        lesson.teach()
    for asked in {id(point.rule): point.rule for point in points}.values():
        asked.finish(samples, chosen["score"], chosen["exit_layer"])
    return ExitOutput(**chosen)


def config_from_dict(saved: dict[str, Any]) -> PretrainedConfig:
    """The transformers config behind a ``config.json``, without our section."""
    values = {name: value for name, value in saved.items() if name not in ("early_exit", "architectures")}
    kind = values.pop("model_type", None)
    if kind is None:
        raise ValueError("config.json: expected a model_type")
    if kind == UerConfig.model_type:
        return UerConfig(**values)
    return AutoConfig.for_model(kind, **values)


def new_backbone(config: PretrainedConfig) -> nn.Module:
    """An fp32 backbone with random weights and no pooler, for weights to be loaded into."""
    if isinstance(config, UerConfig):
        return UerModel(config)
    try:
        return AutoModel.from_config(config, add_pooling_layer=False, dtype=torch.float32)
    except TypeError:  # architectures without a pooler do not take the argument
        return AutoModel.from_config(config, dtype=torch.float32)
