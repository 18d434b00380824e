"""Texts that are too long for memory: in shards on the disk, and the same rows."""

from __future__ import annotations

import errno
import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from moe_tools.atomic import new_file
from moe_tools.data import Rows, packing, rows, shards
from moe_tools.data.reader import Reader
from moe_tools.data.rows import Packing
from tests.data.test_chat import CHAT, chat_tokenizer, write_chat
from tests.tiny import build_tokenizer, passages

TOKENIZER = build_tokenizer()
LENGTH = 16


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the cache; shards of 1,000 tokens."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "SHARD", 1000)
    return tmp_path / "cache" / "moe_tools" / "text"


@pytest.fixture
def text(tmp_path: Path) -> str:
    """200 documents, 6,200 tokens."""
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": words}) + "\n" for words in passages(200)))
    return str(file)


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and every text is too long for memory."""
    return lambda: monkeypatch.setattr(packing, "IN_MEMORY", 0)


def read(source: str, tokens: int | None = None, tokenizer: Any = TOKENIZER, **more: Any) -> Rows:
    options = {"split": "train", "length": LENGTH, "seed": 0} | more
    return rows(source, tokenizer, tokens=tokens, **options)


def content(found: Rows) -> list[Any]:
    """Every row as lists."""
    listed = [found.row(index) for index in range(len(found))]
    learned = [None if row.learned_T is None else row.learned_T.tolist() for row in listed]
    return [*zip((row.ids_T.tolist() for row in listed), learned, strict=True)]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("tokens", [None, 1, 2500, 4000])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_rows_are_those_in_memory(
    text: str, long: Callable[[], None], tokens: int | None, split: str
) -> None:
    expected = read(text, tokens, split=split)
    long()
    found = read(text, tokens, split=split)
    assert isinstance(found, shards.Stored)
    assert content(found) == content(expected)
    assert torch.equal(found.tensor(3), expected.tensor(3))
    assert found.largest >= expected.largest and found.tokens == expected.tokens


@pytest.mark.parametrize("packed", ["joined", "isolated", "padded"])
def test_conversations_are_those_in_memory(
    tmp_path: Path, long: Callable[[], None], packed: Packing
) -> None:
    file = write_chat(tmp_path / "chat.jsonl", 60)
    for tokens in (None, 700):
        expected = read(file, tokens, CHAT, length=64, packing=packed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packing, "IN_MEMORY", 0)
            found = read(file, tokens, CHAT, length=64, packing=packed)
        assert isinstance(found, shards.Stored)
        assert content(found) == content(expected)
        assert [found.size(at) for at in range(len(found))] == [
            expected.size(at) for at in range(len(expected))
        ]


def test_a_mixture_is_the_one_in_memory(
    text: str, tmp_path: Path, long: Callable[[], None]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"w1 w2 w{index % 60}" for index in range(3000)))
    source = f"{text}:0.7 + {other}:0.3"
    expected = read(source, 3000)
    long()
    assert content(read(source, 3000)) == content(expected)


def test_it_is_tokenised_once(
    text: str, long: Callable[[], None], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long()
    first = read(text, 4000)
    before = files(home)
    assert [name for name in before if name.endswith(".ids")] == [
        f"{number:05d}.ids" for number in range(3)
    ]

    def again(*_: Any) -> Any:
        raise AssertionError("read again")

    monkeypatch.setattr(Reader, "read", again)
    assert content(read(text, 4000)) == content(first) and files(home) == before
    assert read(text, 4000).fingerprint == first.fingerprint
    assert read(text, 3000).fingerprint != first.fingerprint


def test_a_larger_budget_goes_on(text: str, long: Callable[[], None], home: Path) -> None:
    expected = content(read(text, 5000))
    long()
    few = content(read(text, 1500))
    kept = {path: path.stat().st_mtime_ns for path in home.rglob("*.ids")}
    assert len(kept) == 1
    assert content(read(text, 5000)) == expected and expected[: len(few)] == few
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


@pytest.mark.parametrize("left", ["00001.ids", "00001.json", "00001.json cut", "00001.ids cut"])
def test_what_a_killed_process_left_half_is_made_again(
    text: str, long: Callable[[], None], home: Path, left: str, caplog: pytest.LogCaptureFixture
) -> None:
    long()
    expected = content(read(text))
    file = next(home.rglob(left.split()[0]))
    if left.endswith("cut"):
        file.write_bytes(file.read_bytes()[:-3])
    else:
        file.unlink()
    assert content(read(text)) == expected
    assert ("is made again" in caplog.text) == (left != "00001.json")


@pytest.mark.parametrize("file", ["00001.ids", "00001.json"])
def test_what_stood_behind_it_is_made_again_in_order(
    text: str, long: Callable[[], None], home: Path, file: str
) -> None:
    expected = content(read(text, 6000))
    long()
    read(text, 4000)
    path = next(home.rglob(file))
    path.write_bytes(path.read_bytes()[:-3])
    assert content(read(text, 6000)) == expected


def test_damage_that_keeps_the_size_is_found(
    text: str, long: Callable[[], None], home: Path
) -> None:
    long()
    read(text, 4000)
    path = next(home.rglob("00001.ids"))
    path.write_bytes(path.read_bytes()[:-40] + bytes(40))
    with pytest.raises(ValueError, match=r"shard 1 in .* is not what was written there: remove"):
        content(read(text, 4000))


def test_a_text_in_order_needs_a_folder_that_may_not_be_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_tools.data import passages as ordering

    monkeypatch.setattr(ordering, "IN_MEMORY", 10)
    file = tmp_path / "a.txt"
    file.write_text("w1 w2 " * 5000)
    assert len(read(str(file), 1000)) == 63


def test_a_source_that_is_not_there_is_said_first(long: Callable[[], None]) -> None:
    long()
    with pytest.raises(ValueError, match=r"data source 'nowhere\.jsonl' is not there"):
        read("nowhere.jsonl", 1000)
    with pytest.raises(ValueError, match="'self' is sampled from a model"):
        read("docs:1 + self:1", 1000)


def test_other_words_other_folders(text: str, long: Callable[[], None], home: Path) -> None:
    long()
    read(text, 2000)
    other = build_tokenizer([f"w{index}" for index in reversed(range(60))])
    found = read(text, 2000, other)
    assert len([*home.iterdir()]) == 2
    one = read(text, 2000)
    assert content(found) != content(one) and content(one) == content(read(text, 2000))
    with open(text, "a") as file:
        file.write(json.dumps({"text": "w5 " * 400}) + "\n")
    read(text, 2000)
    assert len([*home.iterdir()]) == 3


def test_a_full_disk_keeps_what_is_whole(
    text: str, long: Callable[[], None], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = content(read(text))
    long()
    made: list[Path] = []

    def full(file: Path) -> Any:
        made.append(file)
        if file.name == "00002.ids":
            raise OSError(errno.ENOSPC, "No space left on device")
        return new_file(file)

    monkeypatch.setattr(shards, "new_file", full)
    with pytest.raises(ValueError, match=r"cannot be written: No space left .*make room"):
        read(text)
    assert "00001.json" in files(home) and "00002.json" not in files(home)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home.parents[1]))
    monkeypatch.setattr(shards, "SHARD", 1000)
    monkeypatch.setattr(packing, "IN_MEMORY", 0)
    before = home.rglob("00001.ids").__next__().stat().st_mtime_ns
    assert content(read(text)) == expected
    assert home.rglob("00001.ids").__next__().stat().st_mtime_ns == before


def test_an_empty_file_and_too_little_text(
    tmp_path: Path, long: Callable[[], None], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    long()
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(ValueError, match=r"has no text"):
        read(str(empty))
    with caplog.at_level(logging.WARNING, logger="moe_tools"):
        assert len(read(text, 100_000)) < 100_000 // LENGTH
    assert "fewer than the 100000 asked for" in caplog.text


# --- streams


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """Serves so many rows of a stream (None: without end); how many were read."""

    def serve(count: int | None) -> list[int]:
        read = [0]

        def generate() -> Iterator[dict[str, str]]:
            draw, number = random.Random(1), 0
            while count is None or number < count:
                number += 1
                read[0] += 1
                yield {"text": " ".join(f"w{draw.randrange(60)}" for _ in range(30))}

        features = datasets.Features({"text": datasets.Value("string")})

        def load(*_: Any, streaming: bool) -> dict[str, Any]:
            stream = datasets.IterableDataset.from_generator(generate, features=features)
            return {"train": stream, "test": stream}

        monkeypatch.setattr(datasets, "load_dataset", load)
        return read

    return serve


def test_a_stream_is_read_as_it_comes(
    hub: Callable[[int | None], list[int]], long: Callable[[], None]
) -> None:
    served = hub(None)
    expected = read("hub:x", 60_000)
    long()
    served[0] = 0
    found = read("hub:x", 10**12)
    assert served[0] == 0 and len(found) == -(-(10**12) // LENGTH)
    assert content(found.part(0, 3)) == content(expected.part(0, 3))
    assert served[0] == 1000
    assert content(found.part(0, len(expected))) == content(expected)
    # another process goes on from the last shard, in the middle of a window
    again = read("hub:x", 10**12)
    served[0] = 0
    at = len(expected) + 200
    row = again.row(at)
    assert 1000 <= served[0] <= 5000
    assert content(found.part(at, at + 1)) == [(row.ids_T.tolist(), None)]
    assert again.fingerprint == found.fingerprint != read("hub:x", 10**11).fingerprint


def test_a_stream_that_ends_says_how_much_it_had(
    hub: Callable[[int | None], list[int]], long: Callable[[], None]
) -> None:
    hub(100)
    long()
    found = read("hub:x", 100_000)
    assert len(found.row(0).ids_T) == LENGTH
    with pytest.raises(ValueError, match=r"ended after 3,088 tokens, and 100,000 were"):
        found.row(500)


def test_a_stream_that_is_read_whole_has_epochs(
    hub: Callable[[int | None], list[int]], long: Callable[[], None]
) -> None:
    hub(100)
    expected = content(read("hub:x"))
    long()
    assert content(read("hub:x")) == expected and len(expected) == 193


@pytest.mark.parametrize("source", ["text", "chat", "hub"])
def test_several_processes_encode_in_order(
    source: str,
    text: str,
    tmp_path: Path,
    hub: Callable[[int | None], list[int]],
    long: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub(300)
    name = {"text": text, "hub": "hub:x", "chat": str(tmp_path / "chat.jsonl")}[source]
    write_chat(tmp_path / "chat.jsonl", 120)
    packed: Packing = "padded" if source == "chat" else "joined"
    expected = content(read(name, None, CHAT, packing=packed, length=32))
    long()
    monkeypatch.setattr(packing, "workers", lambda: 3)
    assert content(read(name, None, CHAT, packing=packed, length=32)) == expected


def test_what_one_of_them_refuses_is_one_line(
    tmp_path: Path, long: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = chat_tokenizer("{{ raise_exception('no') }}")
    write_chat(tmp_path / "chat.jsonl", 60)
    long()
    monkeypatch.setattr(packing, "workers", lambda: 2)
    with pytest.raises(ValueError, match="cannot write a conversation"):
        read(str(tmp_path / "chat.jsonl"), None, tokenizer, packing="padded")
