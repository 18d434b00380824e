import itertools
import logging
import os
import subprocess
import sys
from contextlib import contextmanager
from unittest.mock import patch

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from moe_tools.data import blocks, fingerprint, generate_blocks
from moe_tools.data.generate import _draw
from moe_tools.data.passages import PASSAGE, passages

WORDS = ["one", "two", "three", "four", "five", "six", "seven"]
EOS, SEP, PAD = 1, 2, 3


def build_tokenizer(**special):
    vocab = {name: i for i, name in enumerate(["[UNK]", "[EOS]", "[SEP]", "[PAD]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # A context of 4, so that a warning about longer sequences would fail the tests.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=4, **special
    )


TOKENIZER = build_tokenizer(eos_token="[EOS]")
DOCUMENTS = st.lists(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join), min_size=1, max_size=50
)
SPLITS = st.sampled_from(["train", "heldout"])


@contextmanager
def reading(texts):
    """Sources that give what `texts` returns for their names, whether they are there or not."""
    with (
        patch("moe_tools.data.reader.texts", lambda source, split: iter(texts(source))),
        patch("moe_tools.data.reader.form", lambda source: "text"),
    ):
        yield


def pack(documents, **arguments):
    with reading(lambda _: documents):
        return blocks("some source", TOKENIZER, **arguments)


def words_of(rows):
    return sorted(rows.flatten().tolist())


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(" ".join(WORDS[: i % 7 + 1]) for i in range(400)))
    return str(path)


# --- packing


@given(DOCUMENTS, SPLITS, st.integers(0, 3))
def test_blocks_of_one_token_are_the_documents_in_some_order_each_with_eos(docs, split, seed):
    flat = pack(docs, split=split, length=1, tokens=None, seed=seed).flatten().tolist()
    found = [list(ids) for word, ids in itertools.groupby(flat, EOS.__ne__) if word]
    expected = [TOKENIZER(d, add_special_tokens=False, verbose=False)["input_ids"] for d in docs]
    assert sorted(found) == sorted(expected)
    assert flat.count(EOS) == len(docs) and flat[-1] == EOS


@given(DOCUMENTS, SPLITS, st.integers(1, 9), st.integers(1, 100), st.integers(0, 3))
def test_blocks_are_a_prefix_of_the_concatenation(docs, split, length, tokens, seed):
    every = pack(docs, split=split, length=1, tokens=None, seed=seed).flatten()
    if len(every) < length:
        with pytest.raises(ValueError, match=f"one block needs {length}"):
            pack(docs, split=split, length=length, tokens=tokens, seed=seed)
        return
    rows = pack(docs, split=split, length=length, tokens=tokens, seed=seed)
    wanted = -(-tokens // length)
    assert rows.dtype == torch.int64
    assert rows.shape == (min(wanted, len(every) // length), length)
    assert torch.equal(rows.flatten(), every[: rows.numel()])


@given(DOCUMENTS)
def test_the_seed_orders_train_and_leaves_heldout(docs):
    train = [pack(docs, split="train", length=1, tokens=None, seed=s) for s in (0, 1)]
    assert words_of(train[0]) == words_of(train[1])
    held = [pack(docs, split="heldout", length=1, tokens=None, seed=s) for s in (0, 1)]
    assert torch.equal(held[0], held[1])


@given(DOCUMENTS)
def test_heldout_does_not_depend_on_the_order_of_the_documents(docs):
    rows = pack(docs, split="heldout", length=1, tokens=None)
    assert torch.equal(rows, pack(docs[::-1], split="heldout", length=1, tokens=None))


@given(DOCUMENTS, st.data(), SPLITS, st.integers(0, 3))
def test_a_passage_more_or_less_moves_no_other(docs, data, split, seed):
    def order(documents):
        flat = pack(documents, split=split, length=1, tokens=None, seed=seed).flatten().tolist()
        return [tuple(ids) for word, ids in itertools.groupby(flat, EOS.__ne__) if word]

    docs = list(dict.fromkeys(docs))
    index = data.draw(st.integers(0, len(docs) - 1))
    (gone,) = order([docs[index]])
    expected = order(docs)
    expected.remove(gone)
    rest = docs[:index] + docs[index + 1 :]
    assert expected == (order(rest) if rest else [])


def test_copies_of_a_training_passage_lie_apart():
    documents = ["one"] * 20 + ["two"] * 20
    flat = pack(documents, split="train", length=1, tokens=None).flatten().tolist()
    assert len(list(itertools.groupby(word for word in flat if word != EOS))) > 10


def test_other_seeds_give_other_orders():
    documents = [" ".join(WORDS[: i % 7 + 1]) for i in range(50)]
    rows = [pack(documents, split="train", length=4, tokens=None, seed=s) for s in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_a_small_request_tokenises_little():
    class Counting:
        eos_token_id = sep_token_id = pad_token_id = EOS
        seen = 0

        def __call__(self, batch, **arguments):
            self.seen += len(batch)
            return TOKENIZER(batch, **arguments)

    tokenizer = Counting()
    with reading(lambda _: ["one two"] * 10_000):
        assert blocks("docs", tokenizer, split="train", length=4, tokens=40).shape == (10, 4)
    assert tokenizer.seen < 100


def test_a_hub_stream_is_read_in_windows():
    served = 0

    def endless():
        nonlocal served
        for i in itertools.count():
            served += 1
            yield {"text": " ".join(WORDS[: i % 7 + 1])}

    def load(*names, streaming):
        stream = datasets.IterableDataset.from_generator(endless)
        return {"train": stream, "test": stream}

    with patch("datasets.load_dataset", load):
        small, large = (
            blocks("hub:x", TOKENIZER, split="train", length=8, tokens=n) for n in (800, 8000)
        )
    assert torch.equal(large[: len(small)], small)
    assert served < 6000  # a thousand rows say, once a call, what the columns hold


@pytest.mark.parametrize(
    ("special", "end"),
    [
        ({"eos_token": "[EOS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}, EOS),
        ({"sep_token": "[SEP]", "pad_token": "[PAD]"}, SEP),
        ({"pad_token": "[PAD]"}, PAD),
    ],
)
def test_documents_end_with_eos_else_sep_else_pad(special, end, corpus):
    rows = blocks(corpus, build_tokenizer(**special), split="heldout", length=1, tokens=None)
    assert rows[-1] == end
    assert (rows == end).sum() == 1


@given(st.text("ab \n", max_size=3 * PASSAGE // 1024), st.integers(1024, 2048))
def test_passages_lose_no_word(text, times):
    text = text * times
    pieces = list(passages(text))
    assert all(0 < len(piece) <= PASSAGE and piece == piece.strip() for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_passages_are_cut_between_paragraphs():
    paragraph = "word " * 300 + "end."
    pieces = list(passages("\n\n".join([paragraph] * 20)))
    assert len(pieces) == 4
    assert all(piece.endswith("end.") for piece in pieces)


# --- determinism

PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from test_packing import TOKENIZER
from moe_tools.data import blocks, fingerprint
for split in ("train", "heldout"):
    print(fingerprint(blocks({corpus!r}, TOKENIZER, split=split, length=16, tokens=64, seed=3)))
"""


@pytest.mark.slow
def test_processes_with_other_hash_seeds_agree(tmp_path):
    for i in range(200):
        (tmp_path / f"{i}.txt").write_text(" ".join(WORDS[: i % 7 + 1]) + f" {i}")
    expected = [
        fingerprint(blocks(str(tmp_path), TOKENIZER, split=s, length=16, tokens=64, seed=3))
        for s in ("train", "heldout")
    ]
    program = PROGRAM.format(tests=os.path.dirname(__file__), corpus=str(tmp_path))
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.split() == expected, done.stderr


def test_fingerprint():
    rows = torch.arange(12).view(3, 4)
    assert fingerprint(rows) == "4d342c941a8823b0"
    assert fingerprint(rows.int()) == fingerprint(rows.t().contiguous().t()) == fingerprint(rows)
    others = [rows.view(4, 3), rows + 1, rows[:2], rows.flip(0)]
    assert len({fingerprint(rows), *map(fingerprint, others)}) == 5


# --- errors and warnings of blocks


def test_too_little_text_for_a_block():
    with pytest.raises(ValueError) as error:
        pack(["one two three four five"] * 6 + ["one"], split="train", length=512, tokens=99)
    assert str(error.value) == (
        "'some source' (train) has 38 tokens, one block needs 512: "
        "use --block-length 32 or more text"
    )


def test_no_text():
    with pytest.raises(ValueError, match=r"^'some source' \(heldout\) has no text: use another"):
        pack([], split="heldout", length=4, tokens=None)


def test_fewer_tokens_than_asked_is_a_warning_with_the_numbers(caplog):
    with caplog.at_level(logging.WARNING, logger="moe_tools"):
        rows = pack(["one two three"] * 5, split="train", length=3, tokens=1000)
    assert rows.shape == (6, 3)
    assert caplog.messages == [
        "'some source' (train) has 20 tokens, fewer than the 1000 asked for: "
        "using 6 blocks of 3 = 18 tokens"
    ]


def test_enough_tokens_is_no_warning(caplog):
    pack(["one two three"] * 5, split="train", length=3, tokens=18)
    pack(["one two three"] * 5, split="train", length=3, tokens=None)
    assert not caplog.messages


@pytest.mark.parametrize(("length", "tokens"), [(0, 5), (-1, None), (4, 0), (4, -3)])
def test_sizes_must_be_positive(length, tokens):
    name, value = ("length", length) if length < 1 else ("tokens", tokens)
    with pytest.raises(ValueError, match=f"^{name} is {value}, but must be at least 1"):
        pack(["one"], split="train", length=length, tokens=tokens)


def test_a_tokenizer_needs_an_end():
    with pytest.raises(ValueError, match=r"has no EOS, SEP or PAD token.*set tokenizer.eos_token"):
        blocks("docs", build_tokenizer(), split="train", length=4, tokens=None)


# --- the donor's own samples


@pytest.fixture(scope="module")
def donor():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=23,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            initializer_range=0.5,
            bos_token_id=5,
            eos_token_id=6,
        )
    )


def test_samples_start_with_bos_and_fill_every_block(donor):
    rows_BT = generate_blocks(donor, length=8, tokens=33, seed=0, batch_size=2)
    assert rows_BT.shape == (5, 8) and rows_BT.dtype == torch.int64
    assert (rows_BT[:, 0] == 5).all()
    assert rows_BT.min() >= 0 and rows_BT.max() < 23
    assert len(rows_BT.unique(dim=0)) == 5


def test_samples_repeat_and_a_larger_budget_appends(donor):
    state = torch.get_rng_state()
    small, again, large, batched, other = (
        generate_blocks(donor, length=8, tokens=tokens, seed=seed, batch_size=size)
        for tokens, seed, size in [(24, 0, 16), (24, 0, 16), (64, 0, 16), (24, 0, 1), (24, 1, 16)]
    )
    assert torch.equal(small, again)
    assert torch.equal(small, large[:3])
    assert torch.equal(small, batched)
    assert not torch.equal(small, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_follow_the_model_without_its_cache(donor):
    cold = generate_blocks(donor, length=16, tokens=64, seed=0, temperature=1e-4)
    with torch.no_grad():
        logits_BTV = donor(input_ids=cold).logits
    assert torch.equal(logits_BTV[:, :-1].argmax(-1), cold[:, 1:])


def test_samples_have_the_frequencies_of_the_model(donor):
    with torch.no_grad():
        expected_V = donor(input_ids=torch.tensor([[5]])).logits[0, -1].softmax(-1)
    rows_BT = generate_blocks(donor, length=2, tokens=8000, seed=0, batch_size=4000)
    found_V = torch.bincount(rows_BT[:, 1], minlength=23) / 4000
    assert (found_V - expected_V).abs().max() < 0.03


def test_sampling_leaves_the_model_as_it_was(donor):
    donor.train()
    donor.lm_head.eval()
    before = [module.training for module in donor.modules()]
    rows_BT = generate_blocks(donor, length=4, tokens=4, seed=0)
    assert [module.training for module in donor.modules()] == before
    donor(input_ids=rows_BT, labels=rows_BT).loss.backward()
    donor.zero_grad()


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=2, max_size=6).filter(any),
    st.floats(0, 1, exclude_max=True),
)
def test_a_draw_never_hits_a_token_without_probability(weights, uniform):
    weight_BV = torch.tensor([weights], dtype=torch.float64)
    token = int(_draw(weight_BV.log(), torch.tensor([uniform], dtype=torch.float64)))
    assert weights[token] > 0
    share = weight_BV[0] / weight_BV.sum()
    assert share[:token].sum() <= uniform + 1e-9 and uniform <= share[: token + 1].sum() + 1e-9


def test_bos_else_eos_else_an_error(donor):
    config = donor.config
    with patch.object(config, "bos_token_id", None):
        assert generate_blocks(donor, length=1, tokens=1, seed=0).item() == 6
        with patch.object(config, "eos_token_id", [7, 8]):
            assert generate_blocks(donor, length=1, tokens=1, seed=0).item() == 7
        with (
            patch.object(config, "eos_token_id", None),
            pytest.raises(ValueError, match=r"neither a BOS nor an EOS.*set model.config.bos"),
        ):
            generate_blocks(donor, length=1, tokens=1, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 33}, "a block of 33 tokens exceeds the context of LlamaForCausalLM, 32 tokens"),
        ({"length": 0}, "length is 0, but must be at least 1"),
        ({"tokens": 0}, "tokens is 0, but must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0, but must be at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0, but must be positive: use 1.0"),
        ({"temperature": float("nan")}, "temperature is nan, but must be positive"),
    ],
)
def test_generate_refuses(donor, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        generate_blocks(donor, **{"length": 4, "tokens": 4, "seed": 0, **arguments})


def test_an_encoder_cannot_sample():
    config = BertConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    with pytest.raises(ValueError, match=r"BertForMaskedLM is no causal.*use 'docs'"):
        generate_blocks(BertForMaskedLM(config), length=4, tokens=4, seed=0)


# --- several sources


def mixed(weights, tokens):
    """blocks_BT of one-word sources: source i says only WORDS[i]."""
    sources = " + ".join(f"{word}:{weight}" for word, weight in zip(WORDS, weights, strict=False))
    wanted = None if tokens is None else tokens * 4
    with reading(lambda name: [f"{name} " * 400]):
        return blocks(sources, TOKENIZER, split="train", length=4, tokens=wanted)


def owners(rows):
    """Which source each block is of."""
    first = TOKENIZER.convert_tokens_to_ids(WORDS[0])
    return [row.max().item() - first for row in rows]


@given(st.lists(st.floats(0.1, 10.0), min_size=2, max_size=5), st.integers(1, 60))
def test_every_prefix_of_a_mixture_has_the_shares_asked_for(weights, count):
    found = owners(mixed(weights, count))
    assert len(found) == count
    for end in range(1, count + 1):
        for source, weight in enumerate(weights):
            share = weight / sum(weights)
            assert abs(found[:end].count(source) - share * end) < len(weights)


def test_a_larger_mixture_only_appends():
    few, many = mixed([0.7, 0.3], 10), mixed([0.7, 0.3], 40)
    assert torch.equal(few, many[:10])
    assert owners(many).count(0) == 28


def test_a_mixture_ends_with_the_source_that_is_used_up(caplog):
    whole = mixed([1.0, 3.0], None)  # 100 blocks of each
    assert owners(whole).count(1) == 100 and owners(whole).count(0) in (33, 34)
    assert "'two' is used up after 13" in caplog.text
