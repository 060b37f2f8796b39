"""Where texts are cut: as in training, and where the position tables end."""

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from ragged_exit.examples import read_tokenizer, token_limit


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
    assert token_limit(tokenizer(told), max_length, encoders) == limit


def tokenizer(told: int) -> SimpleNamespace:
    return SimpleNamespace(model_max_length=told, num_special_tokens_to_add=lambda pair: 3 if pair else 2)


@pytest.mark.parametrize(("told", "max_length"), [(512, 2), (2, None)])
def test_no_room_for_a_word_is_refused(told, max_length):
    """A tokenizer that is asked for less than its special tokens cuts nothing."""
    with pytest.raises(ValueError, match=r"max_length: expected at least 3 tokens, .* got 2"):
        token_limit(tokenizer(told), max_length, [SimpleNamespace(max_positions=512)])


@pytest.mark.parametrize("content", ['{"a": 1}', '{"version": ', "[]"])
def test_a_broken_tokenizer_is_named(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=rf"{tmp_path}: its tokenizer cannot be read"):
        read_tokenizer(tmp_path)


def test_a_tokenizer_that_was_told_nothing_says_what_we_take_for_nothing():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({})))
    assert tokenizer.model_max_length == VERY_LARGE_INTEGER
