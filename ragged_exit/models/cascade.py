"""CascadeBERT: whole models, small to large; where one is not sure the next starts afresh (Li et al., EMNLP 2021)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ragged_exit.backbones import ROBERTA_LIKE
from ragged_exit.executor import Stage
from ragged_exit.models.base import EarlyExitModel, EncoderFactory, ExitPoint, build, config_from_dict
from ragged_exit.models.full_depth import FullDepth
from ragged_exit.models.layered import LayeredModel
from ragged_exit.models.published import LAYOUTS, PublishedLayout, count_prefixes
from ragged_exit.rules import ExitRule, MaxProb

Exit = TypeVar("Exit", ExitPoint, Stage)
_SHARED = ("vocab_size", "pad_token_id", "num_labels")


class CascadeBert(EarlyExitModel):
    """Members of any sizes, tried in order. The cascade's rule, one threshold a member, is asked at a member's end.

    Rows that stay start again in the next member from their token ids; the last member takes whoever is left. A member
    that is itself an early-exit model lets rows go for good by its own rule on the way; its last exit is the cascade's.
    ``exit_member`` says who answered, ``exit_layer`` the layer in that member, ``executed_layers`` the sum of all.
    """

    system: ClassVar[str] = "cascade"

    def __init__(
        self,
        config: PretrainedConfig,
        rule: ExitRule | None = None,
        *,
        members: Sequence[LayeredModel | dict[str, Any]],
    ) -> None:
        """members: models, or what ``options`` wrote of them."""
        super().__init__(config, MaxProb(1.0) if rule is None else rule)
        built = [_from_section(member) if isinstance(member, dict) else member for member in members]
        _check_members(built)
        self.members = nn.ModuleList(built)
        self.check_rule(self.rule)

    @classmethod
    def from_members(cls, members: Sequence[LayeredModel], rule: ExitRule | None = None) -> CascadeBert:
        """A cascade of loaded models, small to large. It holds the models, not copies."""
        config = members[-1].config if members else None
        return cls(config, rule, members=members).eval()  # type: ignore[arg-type]  # None: refused before it is used

    @property
    def num_exits(self) -> int:
        return len(self.members)

    def check_rule(self, rule: ExitRule) -> None:
        """As of any system; and the members' own rules, by which rows leave on the way."""
        super().check_rule(rule)
        for member in self._members():
            member.check_rule(member.rule)
        if rule.learns or rule.initial_state(1, torch.device("cpu")):
            raise ValueError(f"rule: a cascade restarts its rows, so {type(rule).__name__} has nothing to build on")

    def prepare(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As the members have it, in turn: what one has prepared the next leaves as it is."""
        for member in self._members():
            input_ids, attention_mask, token_type_ids = member.prepare(input_ids, attention_mask, token_type_ids)
        return input_ids, attention_mask, token_type_ids

    def prepare_types(self, token_type_ids: Sequence[int]) -> Sequence[int]:
        for member in self._members():
            token_type_ids = member.prepare_types(token_type_ids)
        return token_type_ids

    def options(self) -> dict[str, Any]:
        return {"members": [member.section() | {"config": member.config.to_dict()} for member in self._members()]}

    def exit_points(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> list[ExitPoint]:
        return self._in_turn(lambda member: member.exit_points(input_ids, attention_mask, token_type_ids))

    def stages(self, encoder: EncoderFactory) -> list[Stage]:
        return self._in_turn(lambda member: member.stages(encoder))

    def _in_turn(self, exits_of: Callable[[LayeredModel], list[Exit]]) -> list[Exit]:
        """The exits of all members, each member's last under the cascade's rule."""
        exits: list[Exit] = []
        before = 0  # layers of the members before
        for index, member in enumerate(self._members()):
            own: ExitRule = copy.copy(member.rule)  # another object, should the cascade have been given the same
            *inner, end = exits_of(member)
            ruled = [*(replace(exit, rule=own) for exit in inner), replace(end, rule=self.rule, exit_index=index)]
            exits += [replace(exit, member=index + 1, executed_layers=before + exit.executed_layers) for exit in ruled]
            before += end.executed_layers
        return exits

    def training_loss(self, points: list[ExitPoint], labels: Tensor) -> Tensor:
        """The sum of the members' own losses (the original's difficulty-aware term needs labels of its own)."""
        losses = [
            member.training_loss([point for point in points if point.member == index + 1], labels)
            for index, member in enumerate(self._members())
        ]
        return torch.stack(losses).sum()

    def _members(self) -> list[LayeredModel]:
        return list(self.members)  # type: ignore[arg-type]


def _from_section(saved: dict[str, Any]) -> LayeredModel:
    section = dict(saved)
    member = build({name: value for name, value in section.items() if name != "config"}, section["config"])
    assert isinstance(member, LayeredModel)
    return member


def _check_members(members: Sequence[EarlyExitModel]) -> None:
    if not members or not all(isinstance(member, LayeredModel) for member in members):
        raise ValueError("members: expected at least one single model, and no cascade among them")
    first = members[0].config
    for number, member in enumerate(members[1:], start=2):
        for name in _SHARED:
            if getattr(member.config, name, None) != getattr(first, name, None):
                raise ValueError(
                    f"members: expected one {name}, got {getattr(first, name, None)} in member 1 and "
                    f"{getattr(member.config, name, None)} in member {number}"
                )
        if member.config.max_position_embeddings < first.max_position_embeddings:
            raise ValueError(
                f"members: expected member {number} to take what member 1 takes, {first.max_position_embeddings} "
                f"positions, got {member.config.max_position_embeddings}"
            )
        if (member.config.model_type in ROBERTA_LIKE) != (first.model_type in ROBERTA_LIKE):
            raise ValueError("members: expected all or none to count positions as RoBERTa does")


def _build(saved: dict, state: dict[str, Tensor], dialect: str) -> CascadeBert:
    big = config_from_dict(saved)
    big.num_labels = state["members.0.final.classifier.weight"].shape[0]
    members = []
    for number in range(count_prefixes(state, r"members\.(\d+)\.")):
        prefix = rf"members.{number}.backbone."
        config = copy.deepcopy(big)  # the config of every member, so sizes come from the weights
        config.num_hidden_layers = count_prefixes(state, rf"members\.{number}\.backbone\.encoder\.layer\.(\d+)\.")
        config.intermediate_size, config.hidden_size = state[f"{prefix}encoder.layer.0.intermediate.dense.weight"].shape
        config.num_attention_heads = big.num_attention_heads * config.hidden_size // big.hidden_size
        members.append(FullDepth(config))
    return CascadeBert(members[-1].config, MaxProb(1.0), members=members)


LAYOUTS.append(
    PublishedLayout(
        system="cascade",
        signature=r"^cascade_models\.\d+\.",
        renames=(
            (r"cascade_models\.(\d+)\.pooler\.dense\.(.*)", r"members.\1.final.pooler.\2"),
            (r"cascade_models\.(\d+)\.(.*)", r"members.\1.backbone.\2"),
            (r"cascade_classifiers\.(\d+)\.(.*)", r"members.\1.final.classifier.\2"),
        ),
        build=_build,
    )
)
