"""A tiny encoder with its tokenizer, and labelled lines that it can learn."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = ["good", "great", "fine", "nice", "bad", "awful", "dull", "poor", "film", "plot", "the", "a", "was"]


def save_encoder(folder: Path, layers: int = 3) -> Path:
    """A tiny BERT and its tokenizer, saved as Hugging Face saves them."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=48,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_reviews(path: Path, rows: int = 200) -> Path:
    """Labelled lines: the label says from which four words the adjectives come."""
    generator = torch.Generator().manual_seed(1)
    lines = ["text,label"]
    for _ in range(rows):
        label, length = (int(torch.randint(0, high, (1,), generator=generator)) for high in (2, 6))
        words = [
            WORDS[4 * (1 - label) + int(torch.randint(0, 4, (1,), generator=generator))] for _ in range(length + 1)
        ]
        lines.append(f"the film was {' '.join(words)},{label}")
    path.write_text("\n".join(lines) + "\n")
    return path
