"""A tiny checkpoint with a tokenizer, files of texts and of answers, and `ragged-exit score` as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from cli_cases import WORDS, save_encoder
from tiny import randomise
from transformers import AutoTokenizer

import ragged_exit as rx

ROOT = Path(__file__).parents[1]


def save_checkpoint(folder: Path, num_labels: int = 2) -> Path:
    """A DeeBERT with random heads whose rows leave at several exits."""
    encoder = save_encoder(folder.with_name("encoder"))
    rule = rx.Patience(1, 0.2) if num_labels == 1 else rx.Entropy(0.5)
    system = rx.Pabee if num_labels == 1 else rx.DeeBert
    model = randomise(system.from_backbone(encoder, num_labels=num_labels, rule=rule))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    return folder


def texts(rows: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (rows,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator)) for n in lengths]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ragged_exit.cli", "score", *map(str, arguments)]


def start(*arguments: object, **environment: str) -> subprocess.Popen:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command(*arguments), env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def write(path, rows: list[str], **columns):
    table = pa.table({"text": rows, **columns})
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        style = "none" if path.suffix == ".tsv" else "all_valid"
        options = pa.csv.WriteOptions(delimiter=delimiter, quoting_style=style, quoting_header=style)
        pa.csv.write_csv(table, path, write_options=options)
    return path


def read(path) -> list[dict]:
    if path.suffix == ".parquet":
        return pa.parquet.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    quoting = {"delimiter": "\t", "quote_char": False} if path.suffix == ".tsv" else {}  # the package's own rule
    return pa.csv.read_csv(path, parse_options=pa.csv.ParseOptions(**quoting)).to_pylist()
