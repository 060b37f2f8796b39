"""Where texts are cut: as in training, and where the position tables end."""

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from ragged_exit.examples import token_limit


@pytest.mark.parametrize(
    ("told", "max_length", "limit"),
    [
        (20, None, 20),
        (1000, None, 1000),  # fitted on more than 512 tokens
        (1_000_000, None, 1024),
        (VERY_LARGE_INTEGER, None, 512),
        (20, 700, 700),
        (20, 5000, 1024),
    ],
)
def test_where_texts_are_cut(told, max_length, limit):
    encoders = [SimpleNamespace(max_positions=2048), SimpleNamespace(max_positions=1024)]
    assert token_limit(SimpleNamespace(model_max_length=told), max_length, encoders) == limit


def test_a_tokenizer_that_was_told_nothing_says_what_we_take_for_nothing():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({})))
    assert tokenizer.model_max_length == VERY_LARGE_INTEGER
