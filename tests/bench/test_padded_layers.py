"""The encoders taken apart for the contenders run as Hugging Face's whole ones do, on weights wide enough to tell."""

from __future__ import annotations

import pytest
import torch
from system_cases import config_of, randomised
from tiny import one_thread  # noqa: F401  (autouse)
from transformers import AutoModel
from transformers.masking_utils import create_bidirectional_mask

from ragged_exit.bench.padded_layers import padded_embeddings, padded_layers


@pytest.mark.parametrize("kind", ["bert", "roberta", "albert", "albert in groups", "distilbert", "electra"])
def test_layer_by_layer_is_the_whole_encoder(kind: str) -> None:
    config = config_of(kind.split()[0])
    if kind == "albert in groups":  # which do not divide the layers
        config.num_hidden_layers, config.num_hidden_groups = 18, 14
    backbone = randomised(AutoModel.from_config(config))
    ids = torch.randint(5, config.vocab_size, (6, 9))
    mask = torch.ones_like(ids)
    mask[2, 4:], mask[5, 1:] = 0, 0
    types = None if kind == "distilbert" else torch.randint(0, config.type_vocab_size, ids.shape)
    named = {} if types is None else {"token_type_ids": types}
    with torch.inference_mode():
        expected = backbone(input_ids=ids, attention_mask=mask, output_hidden_states=True, **named).hidden_states
        hidden = padded_embeddings(backbone, ids, types)
        bidirectional = create_bidirectional_mask(config, hidden, mask)
        states = [hidden]
        for layer in padded_layers(backbone):
            output = layer(states[-1], bidirectional)
            states.append(output[0] if isinstance(output, tuple) else output)
    assert len(states) == len(expected) == config.num_hidden_layers + 1
    for state, truth in zip(states, expected, strict=True):
        torch.testing.assert_close(state[mask.bool()], truth[mask.bool()], rtol=0, atol=1e-5)
    assert not torch.allclose(states[1], states[0], atol=0.1)
