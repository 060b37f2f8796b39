"""The workload's figures, by hand."""

import torch
from transformers import BertConfig

from ragged_exit.accelerate import accelerate
from ragged_exit.bench import synthetic
from ragged_exit.bench.synthetic import CLS, FIRST_WORD, TOPIC_WORDS, fit_heads, random_workload, sst2_lengths
from ragged_exit.bench.workload import Workload, work
from ragged_exit.calibration.exit_table import exit_table

CONFIG = BertConfig(hidden_size=8, intermediate_size=16, num_labels=3, num_attention_heads=2)


def test_work_by_hand():
    # row of 2 tokens: a layer is 2*2*(4*64 + 2*8*16) + 4*4*8 = 2176; an exit is 2*(64 + 8*3) = 176
    layers, exits = torch.tensor([3]), torch.tensor([2])
    assert work(CONFIG, [2], layers, exits) == 3 * 2176 + 2 * 176


def test_work_adds_up_over_rows():
    layers, exits = torch.tensor([1, 5]), torch.tensor([1, 5])
    total = work(CONFIG, [2, 7], layers, exits)
    assert total == work(CONFIG, [2], layers[:1], exits[:1]) + work(CONFIG, [7], layers[1:], exits[1:])


def test_padding_rate_by_hand():
    workload = Workload([[1] * 4, [1] * 2, [1] * 1, [1] * 3])
    assert workload.padding_rate(batch_size=2) == 1 - 10 / (2 * 4 + 2 * 3)


def test_sample_is_a_seeded_permutation():
    workload = Workload([[row] for row in range(50)], torch.arange(50))
    first, again, other = workload.sample(20, 1), workload.sample(20, 1), workload.sample(20, 2)
    assert first.sequences == again.sequences != other.sequences
    assert [sequence[0] for sequence in first.sequences] == first.labels.tolist()
    assert len(set(first.labels.tolist())) == 20


def test_token_types_stay_with_their_rows():
    workload = Workload([[row, row] for row in range(50)], token_type_ids=[[0, row] for row in range(50)])
    for chosen in (workload.select([7, 3, 60]), workload.sample(20, 1)):
        assert chosen.token_type_ids == [[0, row] for row, _ in chosen.sequences]
    assert Workload([[1], [2]]).select([1]).token_type_ids is None


def test_synthetic_lengths_look_like_sst2():
    lengths = sst2_lengths(20_000, torch.Generator().manual_seed(0)).double()
    assert 23.5 < lengths.mean() < 24.5
    assert 10.5 < lengths.std() < 13
    assert lengths.min() >= 4 and lengths.max() <= 66
    workload = random_workload(10, 3)
    assert workload.sequences == random_workload(10, 3).sequences


def test_a_row_has_words_of_its_topic_and_of_no_other():
    workload = random_workload(300, 5)
    assert 100 < int(workload.labels.sum()) < 200
    shares = []
    for sequence, label in zip(workload.sequences, workload.labels.tolist(), strict=True):
        topics = [(token - FIRST_WORD) // TOPIC_WORDS for token in sequence[1:]]
        assert sequence[0] == CLS and topics.count(1 - label) == 0
        shares.append(topics.count(label) / len(topics))
    assert 0.7 < sum(shares) / len(shares) < 0.8  # 50 to 100 %


def test_heads_of_a_random_encoder_tell_the_topics_apart(monkeypatch):
    shape = {"hidden_size": 192, "num_attention_heads": 4, "intermediate_size": 256, "num_hidden_layers": 2}
    monkeypatch.setitem(synthetic.SHAPES, "small", shape)
    model = synthetic.random_deebert("small", 0)
    fit_heads(model, 1, "sst2")
    workload = random_workload(300, 5)
    labels = exit_table(accelerate(model), workload.sequences).logits.argmax(2)  # [E, N]
    assert float((labels == workload.labels).double().mean(1).min()) > 0.9
