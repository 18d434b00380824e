"""Conversations, prompts and completions: what is written, and which tokens are learned."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard

from moe_tools.checkpoint.loading import load_tokenizer
from moe_tools.data import Batches, Rows, blocks, rows
from moe_tools.data.sources import form
from moe_tools.names import IGNORE
from tests.export.hosts import donor_gguf
from tests.tiny import WORDS, build_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} <{{ m['role'] }}> {{ m['content'] }} [END]"
    "{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %} <{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %} {{ m['content'] }} [END]{% endgeneration %}"
    "{% else %} {{ m['content'] }} [END]{% endif %}{% endfor %}"
)
FORGETS = (
    "{% for m in messages %} <{{ m['role'] }}> {% if loop.last %}{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} <assistant> {% endif %}"
)


def chat_tokenizer(template: str = TEMPLATE, **special: str) -> Any:
    marks = ["<user>", "<assistant>", "<system>", "[END]", "[BOS]"]
    made = build_tokenizer([*WORDS, *marks])
    made.add_special_tokens({"additional_special_tokens": marks})
    made.bos_token = special.get("bos_token", "[BOS]")
    made.chat_template = template
    return made


CHAT = chat_tokenizer()


def turns(*words: str) -> list[dict[str, str]]:
    """The user, the assistant, and so on."""
    return [
        {"role": ("user", "assistant")[index % 2], "content": said}
        for index, said in enumerate(words)
    ]


TWO = [turns("w1", "w2"), turns("w3", "w4")]


def write(file: Path, *objects: Any) -> str:
    file.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return str(file)


def write_chat(file: Path, count: int) -> str:
    """Conversations of one to three answers."""
    draw = random.Random(0)
    said = lambda: " ".join(draw.choices(WORDS, k=draw.randrange(1, 9)))  # noqa: E731
    talks = [turns(*(said() for _ in range(2 * draw.randrange(1, 4)))) for _ in range(count)]
    return write(file, *({"messages": talk} for talk in talks))


def read(source: str, tokenizer: Any = CHAT, **more: Any) -> Rows:
    options = {"split": "train", "length": 64, "tokens": None, "packing": "padded"} | more
    return rows(source, tokenizer, **options)


def said(found: Rows, tokenizer: Any = CHAT) -> list[tuple[str, str]]:
    """Every row, and what is learned of it."""
    both = []
    for row in (found.row(index) for index in range(len(found))):
        assert row.learned_T is not None
        learned = row.ids_T[row.learned_T]
        both.append((tokenizer.decode(row.ids_T), tokenizer.decode(learned)))
    return sorted(both)


def test_the_loss_is_on_what_the_assistant_says(tmp_path: Path) -> None:
    talk = turns("w1 w2", "w3", "w4", "w5 w6")
    file = write(tmp_path / "a.jsonl", {"messages": talk}, {"messages": turns("w9", "w9")})
    (found,) = said(read(file))
    assert found == (
        "[BOS] <user> w1 w2 [END] <assistant> w3 [END] <user> w4 [END] <assistant> w5 w6 [END]",
        "w3 [END] w5 w6 [END]",
    )
    # by hand: each token, and whether it is learned
    row = read(file).row(0)
    assert row.learned_T is not None and row.learned_T.astype(int).tolist() == [
        *(0, 0, 0, 0, 0),  # [BOS] <user> w1 w2 [END]
        *(0, 1, 1),  # <assistant> w3 [END]
        *(0, 0, 0),  # <user> w4 [END]
        *(0, 1, 1, 1),  # <assistant> w5 w6 [END]
    ]


def test_a_batch_learns_them_at_the_token_before(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *({"messages": turns("w1", f"w{n}")} for n in (2, 3)))
    batch = Batches(read(file, length=16), "padded", 4)[0]
    word = CHAT.convert_tokens_to_ids
    end = word("[END]")
    answer = int(batch.ids_BT[0, 5])
    assert batch.next_labels_BT().tolist() == [
        # [BOS] <user> w1 [END] <assistant> w? [END]
        [IGNORE, IGNORE, IGNORE, IGNORE, answer, end, IGNORE]
    ]
    assert answer in (word("w2"), word("w3"))


def test_older_names_and_a_system_turn(tmp_path: Path) -> None:
    old = [
        {"from": "system", "value": "w1"},
        {"from": "human", "value": "w2"},
        {"from": "gpt", "value": "w3"},
    ]
    file = write(tmp_path / "a.jsonl", {"conversations": old}, {"conversations": old[1:]})
    assert {text for _, text in said(read(file)) + said(read(file, split="heldout"))} == {
        "w3 [END]"
    }
    assert any("<system> w1" in text for text, _ in said(read(file)))


def test_prompts_and_completions(tmp_path: Path) -> None:
    pairs = [{"prompt": f"w1 w{n}", "completion": f"w{n} w2"} for n in range(2)]
    (found,) = said(read(write(tmp_path / "a.jsonl", *pairs)))
    assert found == ("w1 w0 w0 w2 [EOS]", "w0 w2 [EOS]")


def test_a_template_may_mark_what_is_learned(tmp_path: Path) -> None:
    marked = chat_tokenizer(MARKED)
    talk = turns("w1", "w2", "w3", "w4")
    file = write(tmp_path / "a.jsonl", {"messages": talk}, {"messages": turns("w9", "w9")})
    (found,) = said(read(file, marked), marked)
    assert found[1] == "w2 [END] w4 [END]"


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_in_every_kind_of_table(tmp_path: Path, ending: str) -> None:
    objects = [{"id": n, "messages": turns("w1", f"w{n}")} for n in range(30)]
    file = tmp_path / f"a{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(objects), file)
    else:
        write(file, *objects)
    if ending.endswith((".gz", ".zst")):
        pack = gzip.compress if ending.endswith(".gz") else zstandard.compress
        file.write_bytes(pack(file.read_bytes()))
    assert form(str(file)) == "turns"
    assert len(read(str(file))) + len(read(str(file), split="heldout")) == 30


def test_the_text_comes_first_and_a_column_may_be_named(tmp_path: Path) -> None:
    objects = [{"text": f"w1 w{n}", "messages": turns("w2", f"w{n}")} for n in range(30)]
    file = write(tmp_path / "a.jsonl", *objects)
    assert form(file) == "text" and form(f"{file}:messages") == "turns"
    assert read(f"{file}:messages").row(0).learned_T is not None


def test_a_long_conversation_loses_its_end_and_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = [turns("w1", f"{word} " * 40) for word in ("w2", "w3")]
    file = write(tmp_path / "a.jsonl", *({"messages": talk} for talk in long))
    row = read(file, length=16).row(0)
    assert len(row.ids_T) == 16
    assert "1 conversations are longer than 16 tokens" in caplog.text


def test_one_of_which_no_answer_is_left_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    talks = [turns("w1", f"w{n}") for n in range(40)] + [
        turns(f"w{n} " * 40, "w2") for n in range(20)
    ]
    file = write(tmp_path / "a.jsonl", *({"messages": talk} for talk in talks))
    found = read(file, length=16)
    assert all(learned for _, learned in said(found))
    assert "rows have no token of an assistant and are left out" in caplog.text


@pytest.mark.parametrize(
    ("talks", "tokenizer", "message"),
    [
        ([turns("w1"), turns("w2")], CHAT, "no token that an assistant says"),
        (TWO, build_tokenizer(), "has no chat template"),
        (TWO, chat_tokenizer("{{ raise_exception('no') }}"), "cannot write"),
        (
            [turns("w1", "w2", "w3", w) for w in ("w4", "w5")],
            chat_tokenizer(FORGETS),
            "in another way when more",
        ),
        ([[{"role": "user"}]] * 2, CHAT, "columns"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(
    tmp_path: Path, talks: Any, tokenizer: Any, message: str
) -> None:
    file = write(tmp_path / "a.jsonl", *({"messages": talk} for talk in talks))
    with pytest.raises(ValueError, match=message) as error:
        read(file, tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"type": "text", "text": "w2"}, {"type": "text", "text": " w3"}], "w2 w3 [END]"),
        ([{"type": "image", "url": "x"}], None),
        (None, None),
        ({"a": 1}, None),
        (5, None),
        ("\ud800", None),
    ],
)
def test_a_turn_says_text(tmp_path: Path, content: Any, said: str | None) -> None:
    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": content}]
    file = write(tmp_path / "a.jsonl", {"messages": talk}, {"messages": turns("w9", "w9")})
    if said is None:
        with pytest.raises(ValueError, match=r"line 1 has (a turn whose content|half of a surr)"):
            read(file)
        return
    assert {row.ids_T[row.learned_T].tolist() == CHAT(said)["input_ids"] for row in both(file)}


def both(file: str) -> list[Any]:
    """The rows of both sides."""
    sides = [read(file, split=split) for split in ("train", "heldout")]
    return [side.row(at) for side in sides for at in range(len(side))]


def test_calls_of_tools_are_written_or_refused(tmp_path: Path) -> None:
    call = {"function": {"name": "w5", "arguments": {}}}
    talk = [turns("w1")[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    file = write(tmp_path / "a.jsonl", {"messages": talk}, {"messages": turns("w9", "w9")})
    with pytest.raises(ValueError, match=r"does not write calls of tools, and .* calls 'w5'"):
        read(file)
    calls = TEMPLATE.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}{% for c in m['tool_calls'] %}{{ c.function.name }}{% endfor %}",
    )
    tokenizer = chat_tokenizer(calls)
    assert {"w5 [END]", "w9 [END]"} == {
        tokenizer.decode(row.ids_T[row.learned_T])
        for split in ("train", "heldout")
        for side in [read(file, tokenizer, split=split)]
        for row in [side.row(0)]
    }


def test_a_first_word_of_the_assistant_is_context(tmp_path: Path) -> None:
    talk = [{"role": "assistant", "content": "w7"}, *turns("w1", "w2")]
    file = write(tmp_path / "a.jsonl", {"messages": talk}, {"messages": turns("w9", "w9")})
    (found,) = said(read(file))
    assert "<assistant> w7" in found[0] and found[1] == "w2 [END]"


def test_rows_without_turns_are_left_out(tmp_path: Path) -> None:
    rows_of = [
        {"messages": []},
        *({"messages": turns("w1", f"w{n}")} for n in range(5)),
        {"messages": None},
    ]
    file = write(tmp_path / "a.jsonl", *rows_of)
    assert len(both(file)) == 5


def test_no_conversation_is_on_both_sides(tmp_path: Path) -> None:
    """Not even one that differs in case and layout."""
    talks = [turns(f"w{n} w1", f"w{n}") for n in range(60)]
    copies = [turns(f"W{n}\n  w1", f"w{n}  ") for n in range(60)]
    for few in (talks[:3] + copies[:3], talks + copies):
        file = write(tmp_path / f"{len(few)}.jsonl", *({"messages": talk} for talk in few))
        sides = [
            {" ".join(text.split()[:30]).lower() for text, _ in said(read(file, split=split))}
            for split in ("train", "heldout")
        ]
        assert all(sides) and not sides[0] & sides[1]


def test_several_templates_need_a_default(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    file = write(tmp_path / "a.jsonl", *({"messages": turns("w1", f"w{n}")} for n in range(2)))
    tokenizer.chat_template = {"default": TEMPLATE, "rag": "x"}
    assert said(read(file, tokenizer), tokenizer)
    tokenizer.chat_template = {"rag": "x"}
    with pytest.raises(ValueError, match="has no chat template"):
        read(file, tokenizer)


def test_a_schema_that_changes_midway_is_refused(tmp_path: Path) -> None:
    rows_of = [{"messages": turns("w1", "w2")}] * 30
    file = write(tmp_path / "a.jsonl", *rows_of, {"prompt": "w1"})
    with pytest.raises(ValueError, match=r"line 31 has no turns in 'messages'"):
        read(file)
    folder = tmp_path / "both"
    folder.mkdir()
    write(folder / "a.jsonl", *rows_of)
    (folder / "b.txt").write_text("w1 " * 100)
    with pytest.raises(ValueError, match=r"has conversations, but .*b.txt' has text: give them as"):
        read(str(folder))


# --- how texts share a row


def test_isolated_texts_are_whole_and_positions_begin_again(tmp_path: Path) -> None:
    found = read(write_chat(tmp_path / "a.jsonl", 60), packing="isolated")
    batches = Batches(found, "isolated", 2)
    assert sum(batch.ids_BT.numel() for batch in batches) == found.tokens == batches.tokens
    for batch in batches:
        assert batch.ids_BT.shape[0] == 1 and batch.ids_BT.numel() <= 2 * 64
        assert batch.positions_BT is not None and batch.learned_BT is not None
        begins = batch.positions_BT == 0
        assert (batch.ids_BT[begins] == CHAT.bos_token_id).all()
        assert not batch.learned_BT[begins].any()


def test_padding_is_in_no_loss_and_no_count(tmp_path: Path) -> None:
    found = read(write_chat(tmp_path / "a.jsonl", 60))
    batches = Batches(found, "padded", 8)
    assert batches.tokens == found.tokens == sum(batch.tokens for batch in batches)
    assert any(batch.mask_BT is not None and not batch.mask_BT.all() for batch in batches)
    for batch in batches:
        assert batch.mask_BT is not None and batch.learned_BT is not None
        assert not (batch.learned_BT & ~batch.mask_BT).any()


def test_joined_conversations_fill_every_block(tmp_path: Path) -> None:
    found = read(write_chat(tmp_path / "a.jsonl", 60), packing="joined", length=32)
    assert found.uniform and all(len(found.row(at).ids_T) == 32 for at in range(len(found)))
    assert (found.tensor()[:, 0] != CHAT.bos_token_id).any()  # TEMPLATE's own, not of the blocks


def test_text_is_cut_and_loses_nothing_when_isolated(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(" ".join(WORDS) for _ in range(40)))
    source = str(tmp_path / "a.txt")
    whole = blocks(source, CHAT, split="train", length=1, tokens=None).flatten()
    found = read(source, packing="isolated", length=16)
    ids = [token for at in range(len(found)) for token in found.row(at).ids_T]
    assert sorted(ids) == sorted(whole.tolist())


def test_text_and_conversations_are_mixed_by_their_tokens(tmp_path: Path) -> None:
    chat = write_chat(tmp_path / "chat.jsonl", 400)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(WORDS) for _ in range(100)))
    found = read(f"{text}:0.25 + {chat}:0.75", packing="isolated", tokens=3000)
    sizes = {True: 0, False: 0}
    for at in range(len(found)):
        row = found.row(at)
        sizes[row.learned_T is None] += len(row.ids_T)
        if at > 20:
            share = sizes[True] / sum(sizes.values())
            assert abs(share - 0.25) < 64 / sum(sizes.values()) + 0.02
    assert sum(sizes.values()) >= 3000


@pytest.mark.parametrize("bos", ["auto", "always", "never"])
def test_bos_as_the_tokenizer_wants_it_or_as_asked(tmp_path: Path, bos: Any) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(" ".join(WORDS) for _ in range(40)))
    found = read(str(tmp_path / "a.txt"), packing="joined", length=16, bos=bos).tensor()
    first = found[:, 0] == CHAT.bos_token_id
    assert first.all() if bos == "always" else not first.any()
    assert not (found[:, 1:] == CHAT.bos_token_id).any()


def test_bos_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(WORDS) * 10)
    with pytest.raises(ValueError, match=r"has no BOS token, and bos is 'always'"):
        read(str(tmp_path / "a.txt"), build_tokenizer(), packing="joined", bos="always")


def test_equal_conversations_equal_fingerprints(tmp_path: Path) -> None:
    one, other = (write_chat(tmp_path / name, 30) for name in ("a.jsonl", "b.jsonl"))
    assert read(one).fingerprint == read(other).fingerprint != read(one, seed=1).fingerprint
    assert torch.is_tensor(read(one).tensor(2))


# --- a real template


@pytest.mark.slow
def test_a_real_template_by_hand(tmp_path: Path) -> None:
    """SmolLM2-Instruct: the system turn that the template adds, both marks, and what is learned."""
    tokenizer = load_tokenizer(str(donor_gguf()))
    talk = [
        {"role": "user", "content": "Say hello."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Again."},
        {"role": "assistant", "content": "Hello, again."},
    ]
    file = write(tmp_path / "a.jsonl", {"messages": talk}, {"messages": turns("Go", "on")})
    row = read(file, tokenizer, length=128).row(0)
    assert row.learned_T is not None
    parts = itertools.groupby(zip(row.ids_T, row.learned_T, strict=True), key=lambda pair: pair[1])
    said = [(bool(learned), tokenizer.decode([i for i, _ in pairs])) for learned, pairs in parts]
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert said == [
        (
            False,
            f"<|im_start|>system\n{system}<|im_end|>\n"
            "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n",
        ),
        (True, "Hello!<|im_end|>\n"),
        (False, "<|im_start|>user\nAgain.<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Hello, again.<|im_end|>\n"),
    ]
    batch = Batches(read(file, tokenizer, length=128), "isolated", 1)[0]
    labels = batch.next_labels_BT()[0]
    answers = "Hello!<|im_end|>\nHello, again.<|im_end|>\n"
    assert tokenizer.decode(labels[labels != IGNORE]) == answers
