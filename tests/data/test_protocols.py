"""The texts of papers: read from the hub or from copies, and cut, as the papers' scripts do."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from moe_tools.data.protocols import PROTOCOLS, protocol_text, protocol_windows
from tests.tiny import WORDS, build_tokenizer

RAW = " \n = A Title = \n \n w1 w2 , w3 . \n w4\n"
"""As in wiki.test.raw."""
ROWS = ["", " = A Title = \n", "", " w1 w2 , w3 . \n", " w4\n"]
"""What the hub's data set holds of it."""


def starting() -> PreTrainedTokenizerFast:
    """A tokenizer that begins a text with BOS, token 63."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "[BOS]"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", tokenizer.bos_token_id)]
    )
    return tokenizer


def rows_as(kind: str, folder: Path, rows: list[str], column: str = "text") -> Path:
    """The rows in a file of this kind."""
    path = folder / f"copy.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    else:
        datasets.Dataset.from_dict({column: rows}).to_parquet(path)
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What was asked of the hub; `rows` is what it answers, and `read` how many were taken."""
    seen: dict[str, Any] = {"rows": {"text": ROWS}, "read": 0}

    def load(name: str, config: str | None, **options: Any) -> Any:
        seen["asked"] = (name, config, options)
        if isinstance(seen["rows"], Exception):
            raise seen["rows"]

        def stream() -> Any:
            (column,) = seen["rows"]
            for row in seen["rows"][column]:
                seen["read"] += 1
                yield {column: row}

        return datasets.IterableDataset.from_generator(stream)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return seen


# --- the hub


@pytest.mark.parametrize("name", ["wikitext2", "wikitext103"])
def test_wikitext_is_its_test_rows_with_an_empty_line_between(
    name: str, hub: dict[str, Any]
) -> None:
    config = {"wikitext2": "wikitext-2-raw-v1", "wikitext103": "wikitext-103-raw-v1"}[name]
    assert protocol_text(name) == "\n\n".join(ROWS)
    assert hub["asked"] == ("Salesforce/wikitext", config, {"split": "test", "streaming": True})


def test_ptb_is_its_test_sentences_with_a_space_between(hub: dict[str, Any]) -> None:
    hub["rows"] = {"sentence": ["no it was n't", "<unk> N"]}
    assert protocol_text("ptb") == "no it was n't <unk> N"
    name, config, options = hub["asked"]
    assert (name, config) == ("ptb-text-only/ptb_text_only", None)
    assert options["data_files"] == {"test": "penn_treebank/test/0000.parquet"}
    assert options["split"] == "test" and options["revision"] == "refs/convert/parquet"


def test_c4_is_the_first_documents_of_one_shard(hub: dict[str, Any]) -> None:
    hub["rows"] = {"text": [f"w{n % 60}" for n in range(2000)]}
    assert protocol_text("c4") == " ".join(hub["rows"]["text"][:1100])
    name, _, options = hub["asked"]
    assert name == "allenai/c4"
    assert options["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert 1100 <= hub["read"] < 2000 + 1001  # a shard is not read to its end for its columns


def test_another_data_set_gives_the_same_split(hub: dict[str, Any]) -> None:
    hub["rows"] = {"body": ["a", "b"]}
    assert protocol_text("wikitext2", "hub:o/n:c:body") == "a\n\nb"
    assert hub["asked"] == ("o/n", "c", {"split": "test", "streaming": True})
    protocol_text("c4", "o/n")
    assert hub["asked"] == ("o/n", None, {"split": "validation", "streaming": True})


def test_a_hub_that_is_not_reached_is_one_line(hub: dict[str, Any]) -> None:
    hub["rows"] = ConnectionError("no network\nlong tale")
    with pytest.raises(ValueError, match=r"'allenai/c4' cannot be read: no network .*name a copy"):
        protocol_text("c4")


def test_the_real_library_reads_the_files_of_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laid out as on the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    shard = tmp_path / "c4" / str(PROTOCOLS["c4"].file)
    shard.parent.mkdir(parents=True)
    rows = [{"text": f"w{n % 60}", "timestamp": "2019-04-25T12:57:54Z"} for n in range(1200)]
    with gzip.open(shard, "wt") as file:
        file.writelines(json.dumps(row | {"url": "http://x"}) + "\n" for row in rows)
    monkeypatch.setitem(PROTOCOLS, "c4", replace(PROTOCOLS["c4"], hub=str(tmp_path / "c4")))
    assert protocol_text("c4") == " ".join(row["text"] for row in rows[:1100])
    test = tmp_path / "ptb" / str(PROTOCOLS["ptb"].file)
    test.parent.mkdir(parents=True)
    datasets.Dataset.from_dict({"sentence": ["w1 w2", "w3"]}).to_parquet(test)
    monkeypatch.setitem(PROTOCOLS, "ptb", replace(PROTOCOLS["ptb"], hub=str(tmp_path / "ptb")))
    assert protocol_text("ptb") == "w1 w2 w3"
    wiki = tmp_path / "wiki" / "wikitext-2-raw-v1"
    wiki.mkdir(parents=True)
    for split, rows_ in (("train", ["w9"]), ("test", ROWS)):
        name = f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict({"text": rows_}).to_parquet(wiki / name)
    card = "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
    card += "".join(
        f"  - {{split: {split}, path: wikitext-2-raw-v1/{split}-*}}\n"
        for split in ("train", "test")
    )
    (wiki.parent / "README.md").write_text(card + "---\n")
    own = replace(PROTOCOLS["wikitext2"], hub=str(wiki.parent))
    monkeypatch.setitem(PROTOCOLS, "wikitext2", own)
    assert protocol_text("wikitext2") == "\n\n".join(ROWS)


# --- copies


def test_the_raw_file_of_wikitext_is_the_data_set_of_the_hub(tmp_path: Path) -> None:
    for name in ("wiki.test.raw", "copy.txt", "copy.md"):
        (tmp_path / name).write_text(RAW)
        assert protocol_text("wikitext2", str(tmp_path / name)) == "\n\n".join(ROWS)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_a_table_keep_their_blanks(kind: str, tmp_path: Path) -> None:
    path = rows_as(kind, tmp_path, ROWS)
    assert protocol_text("wikitext2", str(path)) == "\n\n".join(ROWS)
    named = rows_as(kind, tmp_path, ROWS, column="page")
    assert protocol_text("wikitext2", f"{named}:page") == "\n\n".join(ROWS)


def test_the_text_file_of_ptb_is_a_sentence_a_line(tmp_path: Path) -> None:
    (tmp_path / "ptb.test.txt").write_text(" no it was n't \n <unk> N \n")
    assert protocol_text("ptb", str(tmp_path / "ptb.test.txt")) == "no it was n't <unk> N"


def test_a_text_file_of_c4_is_one_document_and_a_table_many(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w1\nw2\n")
    assert protocol_text("c4", str(tmp_path / "a.txt")) == "w1\nw2\n"
    rows = [f"w{n % 60}" for n in range(1200)]
    assert protocol_text("c4", str(rows_as("jsonl", tmp_path, rows))) == " ".join(rows[:1100])


def test_a_folder_gives_the_files_of_its_split_alone(tmp_path: Path) -> None:
    for part in ("train", "valid", "test"):
        (tmp_path / f"wiki.{part}.raw").write_text(f" \n = {part} = \n{RAW}")
    assert protocol_text("wikitext2", str(tmp_path)) == "\n\n".join(["", " = test = \n", *ROWS])
    shards = tmp_path / "c4"
    shards.mkdir()
    for name in ("train", "validation-1", "validation-0"):
        (shards / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    assert protocol_text("c4", str(shards)) == "validation-0 validation-1"


def test_a_folder_with_one_file_needs_no_name(tmp_path: Path) -> None:
    (tmp_path / "anything.txt").write_text("w1")
    assert protocol_text("ptb", str(tmp_path)) == "w1"


def folder_of(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("w1")
    return folder


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.txt", "b.txt"), "has 2 files, and none is called test: name the file or folder"),
        (("wikitext-2/test.txt", "wikitext-103/test.txt"), "has test files in several folders"),
        (("a.csv",), r"has no file of text \(.raw, .txt, .md, .jsonl, .parquet\)"),
    ],
)
def test_a_folder_in_doubt_is_refused(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        protocol_text("wikitext2", str(folder_of(tmp_path, *names)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("docs", "'docs' is no copy of wikitext2: use a file, a folder or hub:NAME"),
        ("self", "is no copy of wikitext2"),
        ("a.txt + a.txt", "is no copy of wikitext2"),
        ("missing.txt", "'missing.txt' is not there: wikitext2 is read from a file"),
        ("a.csv", "is no .raw, .txt, .md, .jsonl, .parquet file: convert it"),
        ("shard.json.gz", "convert it"),
        ("a.txt:body", "has no columns, so none is 'body'"),
        ("blank.txt", "blank.txt has no text: wikitext2 needs some"),
        ("binary.txt", "is not readable UTF-8 text"),
    ],
)
def test_sources_that_are_none(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder_of(tmp_path, "a.txt", "a.csv", "shard.json.gz"))
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=message) as error:
        protocol_text("wikitext2", source)
    assert "\n" not in str(error.value)


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(ValueError, match="'wikitext' is unknown: use wikitext2, wikitext103, c4"):
        protocol_text("wikitext")


# --- windows


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A file of 60 words, tokens 3 to 62."""
    file = tmp_path / "words.txt"
    file.write_text("\n".join(WORDS))
    return str(file)


def test_windows_follow_each_other_and_the_rest_is_left_out(text: str) -> None:
    windows = protocol_windows("ptb", build_tokenizer(), length=8, source=text)
    assert torch.equal(windows, torch.arange(3, 3 + 56).view(7, 8))


def test_bos_stands_once_at_the_start(text: str) -> None:
    windows = protocol_windows("ptb", starting(), length=8, source=text)
    expected = torch.cat([torch.tensor([63]), torch.arange(3, 3 + 55)])
    assert torch.equal(windows, expected.view(7, 8))


def test_windows_with_a_stride_overlap(text: str) -> None:
    windows = protocol_windows("ptb", build_tokenizer(), length=8, stride=3, source=text)
    assert windows[:, 0].tolist() == list(range(3, 3 + 53, 3))  # the last begins at 51 or 52
    assert all(row.tolist() == list(range(row[0], row[0] + 8)) for row in windows)


@pytest.mark.parametrize(
    ("tokens", "stride", "count"),
    [
        (1, None, 1),
        (16, None, 2),
        (17, None, 3),
        (999, None, 7),
        (8, 3, 1),
        (9, 3, 2),
        (11, 3, 2),
        (12, 3, 3),
    ],
)
def test_fewer_tokens_are_the_first_windows(
    tokens: int, stride: int | None, count: int, text: str
) -> None:
    options: dict[str, Any] = {"length": 8, "stride": stride, "source": text}
    whole = protocol_windows("ptb", build_tokenizer(), **options)
    some = protocol_windows("ptb", build_tokenizer(), tokens=tokens, **options)
    assert torch.equal(some, whole[:count])


def test_c4_ends_after_256_windows(tmp_path: Path) -> None:
    path = rows_as("jsonl", tmp_path, ["w1 w2 w3 w4"] * 300)
    assert protocol_windows("c4", build_tokenizer(), length=4, source=str(path)).shape == (256, 4)
    wide = protocol_windows("c4", build_tokenizer(), length=5, source=str(path))
    assert wide.shape == (240, 5)  # 1200 tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 61}, "has 60 tokens, one window of ptb needs 61: use a smaller --block-length"),
        ({"length": 8, "stride": 9}, "a stride of 9 leaves tokens out between windows of 8"),
        ({"length": 8, "stride": 0}, "--stride is a number from 1 to 8"),
        ({"length": 0}, "length is 0"),
        ({"length": 8, "tokens": 0}, "tokens is 0"),
    ],
)
def test_sizes_that_are_not_possible(options: dict[str, Any], message: str, text: str) -> None:
    with pytest.raises(ValueError, match=message):
        protocol_windows("ptb", build_tokenizer(), source=text, **options)


def test_the_command_line_knows_every_protocol() -> None:
    from moe_tools.cli.options import PROTOCOLS as NAMES

    assert tuple(PROTOCOLS) == NAMES
