"""What the packed encoder needs of a backbone: its weights under neutral names, and its conventions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ragged_exit.linears import check_activation


class UerLayerNorm(nn.Module):
    """weight (x - mean) / (std + eps) + bias with the unbiased standard deviation: not ``nn.LayerNorm``.

    Of ``models.uer``; here, because ``weight_of`` must know it.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.weight * centred / (x.std(-1, keepdim=True) + self.eps) + self.bias


_PLAIN = (nn.Linear, nn.Embedding, nn.LayerNorm, UerLayerNorm)  # their weights say all that they compute
ROBERTA_LIKE = ("camembert", "roberta", "xlm-roberta")  # model types that differ in their vocabulary alone
_OUTPUT_HOOKS = "transformers."  # collect hidden states, change none
_WEIGHT_HOOKS = "torch.nn.utils."  # pruning, spectral norm, the old weight norm: set weight or bias at every call


def weight_of(module: nn.Module) -> Tensor:
    """Its weight, and ``module.bias`` is right from here on: a pruned module's are set anew, as a call would.

    Raises ValueError for a module that computes something else with them, as an adapter's wrapper does.
    """
    _check_forward(module)
    kind = type(module)
    if kind.forward not in [plain.forward for plain in _PLAIN]:
        raise ValueError(
            "model: expected plain linears, embeddings and LayerNorms, "
            f"got a {kind.__module__}.{kind.__qualname__}; merge adapters into the weights first"
        )
    if getattr(module, "max_norm", None) is not None:
        raise ValueError(f"model: expected embeddings without max_norm, got {module.max_norm}")
    _set_weights(module)
    return module.weight  # type: ignore[return-value]


def _set_weights(module: nn.Module) -> None:
    """Run the hooks that set weight and bias: both are stale since the last step, or since a state was loaded."""
    training = module.training
    module.training = False  # in training spectral_norm goes a step on, and a reader changes nothing
    try:
        with torch.no_grad():
            for hook in module._forward_pre_hooks.values():
                if _origin(hook).startswith(_WEIGHT_HOOKS):
                    hook(module, ())
    finally:
        module.training = training


def _origin(hook: Callable[..., Any]) -> str:
    return str(getattr(hook, "__module__", ""))


def _check_forward(module: nn.Module) -> None:
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if not _origin(hook).startswith((_OUTPUT_HOOKS, _WEIGHT_HOOKS)):
            raise ValueError(
                f"model: expected modules without forward hooks, which are not run, got {hook!r} on a "
                f"{type(module).__name__}; remove it first"
            )
    compiled = "_orig_mod" in module._modules  # torch.compile's wrapper around the module that it holds
    faster = hasattr(module, "kernel_layer_name")  # the kernels library's for the same function, as transformers asks
    if "forward" in vars(module) and not (compiled or faster):
        raise ValueError(
            "model: expected modules that run their class's forward, got a "
            f"{type(module).__name__} with one of its own; remove it first"
        )


@dataclass(frozen=True)
class Affine:
    """weight ``[N, K]`` (or ``[H]`` for a LayerNorm) and bias ``[N]``."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, module: nn.Module) -> Affine:
        return cls(weight_of(module), module.bias)  # type: ignore[arg-type]


@dataclass(frozen=True)
class LayerWeights:
    """One post-LayerNorm transformer layer; qkv is query, key and value stacked: ``[3 H, H]``."""

    qkv: Affine
    attention_output: Affine
    attention_norm: Affine
    feed_forward_up: Affine
    feed_forward_down: Affine
    output_norm: Affine


@dataclass(frozen=True)
class BackboneWeights:
    """A whole encoder. E is the embeddings' width, H the layers'; they differ only where there is a projection.

    layers: the same object where layers share their weights (ALBERT). padding_idx: set where positions count from it
    (RoBERTa). norm_kind: see ``ops.add_layer_norm``.
    """

    word_embeddings: Tensor  # [V, E]
    position_embeddings: Tensor  # [S, E]
    token_type_embeddings: Tensor | None  # [K, E]
    embedding_norm: Affine
    layers: list[LayerWeights]
    num_heads: int
    activation: str
    norm_eps: float
    padding_idx: int | None = None
    embedding_projection: Affine | None = None  # E -> H
    norm_kind: str = "standard"

    @property
    def hidden_size(self) -> int:
        return self.layers[0].qkv.weight.shape[1]

    @property
    def max_positions(self) -> int:
        """The longest sequence that the position table holds."""
        offset = 0 if self.padding_idx is None else self.padding_idx + 1
        return self.position_embeddings.shape[0] - offset


def backbone_weights(backbone: nn.Module) -> BackboneWeights:
    """Read an encoder of transformers (BERT, RoBERTa and its like, ELECTRA, ALBERT, DistilBERT) or our ``UerModel``.

    The result refers to the parameters where it can. Raises ValueError naming what is not supported: another
    architecture, a decoder, relative positions, modules that ``weight_of`` refuses, LayerNorms that differ in their eps
    or have no bias, layers that differ in how many heads they have, an activation that is unknown or not the config's,
    forward hooks, a forward that was replaced.
    """
    config = check_backbone(backbone)
    for module in backbone.modules():
        _check_forward(module)
    return BackboneWeights(**_READERS[config.model_type](backbone, config), norm_eps=_norm_eps(backbone))


def check_backbone(backbone: nn.Module) -> Any:
    """Its config. Raises ValueError for another architecture, a decoder, relative positions, layers cut off by hand."""
    config: Any = getattr(backbone, "config", None)
    kind = getattr(config, "model_type", type(backbone).__name__)
    if kind not in _READERS:
        raise ValueError(f"backbone: expected an encoder of {sorted(_READERS)}, got model type {kind!r}")
    if getattr(config, "is_decoder", False):
        raise ValueError("backbone: expected an encoder, got is_decoder=True")
    positions = getattr(config, "position_embedding_type", "absolute") or "absolute"
    if positions != "absolute":
        raise ValueError(f"backbone: expected absolute position embeddings, got {positions!r}")
    if kind != "albert" and len(_layers(backbone)) != config.num_hidden_layers:  # its layers share modules
        raise ValueError(
            f"backbone: expected {config.num_hidden_layers} layers, its config's num_hidden_layers, "
            f"got {len(_layers(backbone))}"
        )
    return config


def _layers(backbone: Any) -> Any:
    places = {"distilbert": "transformer.layer", "uer": "encoder.transformer"}
    return backbone.get_submodule(places.get(backbone.config.model_type, "encoder.layer"))


def _norm_eps(backbone: nn.Module) -> float:
    """What its LayerNorms hold: the config may have changed since they were made."""
    norms = [module for module in backbone.modules() if isinstance(module, nn.LayerNorm | UerLayerNorm)]
    if any(norm.weight is None or norm.bias is None for norm in norms):
        raise ValueError("model: expected LayerNorms with weight and bias, got one without")
    found = {norm.eps for norm in norms}
    if len(found) > 1:
        raise ValueError(f"model: expected LayerNorms of one eps, got {sorted(found)}")
    return found.pop()


def _activation(name: str, functions: list[nn.Module]) -> str:
    """``name``, the config's. Raises ValueError for an unknown one, and where a layer computes something else."""
    check_activation(name)
    for function in functions:
        if type(function) is not type(ACT2FN[name]):
            raise ValueError(f"model: expected the activation {name!r} of its config in all layers, got {function!r}")
    return name


def _heads(attentions: Sequence[nn.Module], name: str = "num_attention_heads") -> int:
    """What its layers hold: the config may have changed since they were made."""
    found = {getattr(attention, name) for attention in attentions}
    if len(found) > 1:
        raise ValueError(f"model: expected as many attention heads in all layers, got {sorted(found)}")
    return found.pop()


def _bias(linear: nn.Module) -> Tensor:
    """Zeros where a linear has none."""
    weight: Tensor = weight_of(linear)
    bias: Any = linear.bias
    return weight.new_zeros(len(weight)) if bias is None else bias


def stack(*parts: nn.Module) -> Affine:
    """Several linears on one input as one: weights and biases concatenated."""
    return Affine(
        torch.cat([weight_of(part) for part in parts]),
        None if all(part.bias is None for part in parts) else torch.cat([_bias(part) for part in parts]),
    )


def _bert(backbone: Any, config: Any) -> dict[str, Any]:
    layers = _layers(backbone)
    return _embeddings(backbone.embeddings) | {
        "layers": [_bert_layer(layer) for layer in layers],
        "num_heads": _heads([layer.attention.self for layer in layers]),
        "activation": _activation(config.hidden_act, [layer.intermediate.intermediate_act_fn for layer in layers]),
    }


def _roberta(backbone: Any, config: Any) -> dict[str, Any]:
    return _bert(backbone, config) | {"padding_idx": backbone.embeddings.padding_idx}


def _electra(backbone: Any, config: Any) -> dict[str, Any]:
    projection = getattr(backbone, "embeddings_project", None)
    return _bert(backbone, config) | {"embedding_projection": None if projection is None else Affine.of(projection)}


def _albert(backbone: Any, config: Any) -> dict[str, Any]:
    if config.inner_group_num != 1:
        raise ValueError(f"backbone: expected ALBERT with inner_group_num 1, got {config.inner_group_num}")
    encoder = backbone.encoder
    groups = encoder.albert_layer_groups
    layers = [_albert_layer(group.albert_layers[0]) for group in groups]
    depth = config.num_hidden_layers
    each = depth / config.num_hidden_groups  # layers a group; rounded as transformers does
    return _embeddings(backbone.embeddings) | {
        "layers": [layers[int(index / each)] for index in range(depth)],
        "num_heads": _heads([group.albert_layers[0].attention for group in groups]),
        "activation": _activation(config.hidden_act, [group.albert_layers[0].activation for group in groups]),
        "embedding_projection": Affine.of(encoder.embedding_hidden_mapping_in),
    }


def _distilbert(backbone: Any, config: Any) -> dict[str, Any]:
    layers = _layers(backbone)
    return _embeddings(backbone.embeddings) | {
        "layers": [_distilbert_layer(layer) for layer in layers],
        "num_heads": _heads([layer.attention for layer in layers], "n_heads"),
        "activation": _activation(config.activation, [layer.ffn.activation for layer in layers]),
    }


def _uer(backbone: Any, config: Any) -> dict[str, Any]:
    embedding = backbone.embedding
    return {
        "word_embeddings": weight_of(embedding.word_embedding),
        "position_embeddings": weight_of(embedding.position_embedding),
        "token_type_embeddings": weight_of(embedding.segment_embedding)[1:],  # row 0 is the padding's
        "embedding_norm": Affine.of(embedding.layer_norm),
        "layers": [_uer_layer(layer) for layer in _layers(backbone)],
        "num_heads": _heads([layer.self_attn for layer in _layers(backbone)], "num_heads"),
        "activation": "gelu",
        "norm_kind": "uer",
    }


_READERS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "albert": _albert,
    "bert": _bert,
    "distilbert": _distilbert,
    "electra": _electra,
    "uer": _uer,
    **dict.fromkeys(ROBERTA_LIKE, _roberta),
}


def _embeddings(embeddings: Any) -> dict[str, Any]:
    types = getattr(embeddings, "token_type_embeddings", None)
    return {
        "word_embeddings": weight_of(embeddings.word_embeddings),
        "position_embeddings": weight_of(embeddings.position_embeddings),
        "token_type_embeddings": None if types is None else weight_of(types),
        "embedding_norm": Affine.of(embeddings.LayerNorm),
    }


def _bert_layer(layer: Any) -> LayerWeights:
    attention = layer.attention
    return LayerWeights(
        qkv=stack(attention.self.query, attention.self.key, attention.self.value),
        attention_output=Affine.of(attention.output.dense),
        attention_norm=Affine.of(attention.output.LayerNorm),
        feed_forward_up=Affine.of(layer.intermediate.dense),
        feed_forward_down=Affine.of(layer.output.dense),
        output_norm=Affine.of(layer.output.LayerNorm),
    )


def _albert_layer(layer: Any) -> LayerWeights:
    attention = layer.attention
    return LayerWeights(
        qkv=stack(attention.query, attention.key, attention.value),
        attention_output=Affine.of(attention.dense),
        attention_norm=Affine.of(attention.LayerNorm),
        feed_forward_up=Affine.of(layer.ffn),
        feed_forward_down=Affine.of(layer.ffn_output),
        output_norm=Affine.of(layer.full_layer_layer_norm),
    )


def _distilbert_layer(layer: Any) -> LayerWeights:
    attention = layer.attention
    return LayerWeights(
        qkv=stack(attention.q_lin, attention.k_lin, attention.v_lin),
        attention_output=Affine.of(attention.out_lin),
        attention_norm=Affine.of(layer.sa_layer_norm),
        feed_forward_up=Affine.of(layer.ffn.lin1),
        feed_forward_down=Affine.of(layer.ffn.lin2),
        output_norm=Affine.of(layer.output_layer_norm),
    )


def _uer_layer(layer: Any) -> LayerWeights:
    attention = layer.self_attn
    return LayerWeights(
        qkv=stack(*attention.linear_layers),  # query, key, value
        attention_output=Affine.of(attention.final_linear),
        attention_norm=Affine.of(layer.layer_norm_1),
        feed_forward_up=Affine.of(layer.feed_forward.linear_1),
        feed_forward_down=Affine.of(layer.feed_forward.linear_2),
        output_norm=Affine.of(layer.layer_norm_2),
    )
