import gzip
import json

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_tools.data import texts
from moe_tools.data.holdout import boundary, divide, normalise
from moe_tools.data.sources import absolute, is_hub, mixture, shortened


def read(source, split="train"):
    return list(texts(str(source), split=split))


def everything(source):
    return read(source) + read(source, "heldout")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


# --- files


def test_text_files_hold_out_their_end(tmp_path):
    paragraphs = [f"Paragraph {i} " + "word " * 10 + "end." for i in range(100)]
    for name in ("a.txt", "b.md", "C.TXT"):
        path = tmp_path / name
        path.write_text("\ufeff" + "\n\n".join(paragraphs), encoding="utf-8")
        (train,), (held,) = read(path), read(path, "heldout")
        assert [*train.split("\n\n"), *held.split("\n\n")] == paragraphs
        assert 0.05 <= len(held) / len(train + held) <= 0.1


def test_json_lines(tmp_path):
    rows = [{"text": f"document {i} \u2028 with a line end of Unicode"} for i in range(40)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    path.write_text(path.read_text() + '\n{"text": "  "}\n\n')
    assert sorted(everything(path)) == sorted(row["text"] for row in rows)
    assert len(read(path, "heldout")) == 2


@pytest.mark.parametrize("columns", [{"text": 0, "other": 1}, {"only": 0}])
def test_parquet(tmp_path, columns):
    rows = {name: [f"row {i} {column}" for i in range(40)] for name, column in columns.items()}
    path = tmp_path / "a [1].parquet"
    datasets.Dataset.from_dict({**rows, "number": list(range(40))}).to_parquet(path)
    assert sorted(everything(path)) == sorted(f"row {i} 0" for i in range(40))


def test_a_folder_is_read_in_sorted_order_without_hidden_and_foreign_files(tmp_path):
    for name in ("b/2.txt", "a/1.md", "b/1.txt", ".git/x.txt", "b/.x.txt", "b/x.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    write_lines(tmp_path / "z.jsonl", [{"text": "text of z, a last document that may be cut"}])
    names = ["a/1.md", "b/1.txt", "b/2.txt"]
    assert everything(tmp_path)[:3] == [f"text of {name}" for name in names]
    assert " ".join(everything(tmp_path)[3:]).startswith("text of z")


def test_a_path_may_start_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("some words in a file")
    assert " ".join(everything("~/a.txt")) == "some words in a file"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"has no text: use a file with some"),
        ('{"text": ""}', r"has no text: use a file with some"),
        (
            '{"text": "a"}\n\n{"txt": "b"}',
            r'line 3 has no string "text": every row must have one, or null',
        ),
        ('{"text": 5}', r'line 1 has no string "text"'),
        ('["text"]', r"line 1 is no object: every line must be"),
        ('{"text": "a"}\n{"text": ', r"line 2 is not JSON \(.*\): one object a line is needed"),
        ('{"text": "\\ud800"}', r"line 1 has half of a surrogate pair"),
        ('{"text": "a"}', r"has 1 characters, too few to hold some out: use more text"),
    ],
)
def test_bad_json_lines(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path):
    binary, csv, parquet = (tmp_path / name for name in ("a.txt", "a.csv", "a.parquet"))
    binary.write_bytes(b"\xff\xfe\x00")
    csv.write_text("text")
    parquet.write_text("not parquet")
    (tmp_path / "empty").mkdir()
    for path, message in [
        (binary, "is not readable UTF-8 text"),
        (csv, r"is not a .txt, .md, .jsonl or .parquet file: convert it"),
        (parquet, "cannot be read"),
        (tmp_path / "empty", "has no .txt, .md, .jsonl or .parquet file: use a folder with text"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source",
    [
        "",
        "doc",
        "missing.txt",
        "no/such.jsonl:b",
        "./a",
        "~/x",
        "~no-such-user/x",
        "hub:",
        "a" * 999,
    ],
)
def test_unknown_sources(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"is not there: use 'docs', 'self', an existing .txt,"):
        read(source)


def test_self_has_no_texts():
    with pytest.raises(ValueError, match=r"'self' is sampled.*call generate_blocks.*use 'docs'"):
        texts("self", split="train")


def test_splits_are_two(tmp_path):
    with pytest.raises(ValueError, match="split 'test' is unknown: use 'train' or 'heldout'"):
        texts("docs", split="test")


# --- holding out


@given(st.lists(st.text("abc ", min_size=3).map(str.strip).filter(bool), min_size=1, max_size=80))
def test_divide_is_a_division(documents):
    try:
        train, held = ([*divide(lambda: documents, split, "x")] for split in ("train", "heldout"))
    except ValueError:
        assert len("".join(documents)) < 2
        return
    assert train and held and all(train) and all(held)
    if len(set(map(normalise, documents))) >= 20:
        assert sorted(train + held) == sorted(documents)
        assert not set(map(normalise, train)) & set(map(normalise, held))
        distinct = len(set(map(normalise, documents)))
        assert len(set(map(normalise, held))) == distinct // 20
    else:
        assert "".join("".join(train + held).split()) == "".join("".join(documents).split())


def test_a_tail_takes_whole_documents_and_cuts_a_long_one():
    def held_out(*documents):
        return [*divide(lambda: documents, "heldout", "x")]

    assert held_out("long " * 30, "document") == ["document"]
    (held,) = held_out("long " * 400)
    assert 95 <= len(held) <= 200 and set(held.split()) == {"long"}
    assert len(held_out("long " * 200, "end")) == 2


def test_a_boundary_is_the_last_good_one():
    assert boundary("a b\n\nc\nd e", 0, 10) == 3
    assert boundary("a b\n\nc\nd e", 4, 10) == 6
    assert boundary("abcdef", 0, 4) == 4


def test_a_damaged_archive_is_one_line(tmp_path):
    whole = gzip.compress(b"some text " * 100)
    for name, body in (
        ("cut.txt.gz", whole[:-20]),
        ("no.txt.gz", b"text"),
        ("no.txt.zst", b"text"),
    ):
        (tmp_path / name).write_bytes(body)
        with pytest.raises(ValueError, match=f"{name}' is not readable UTF-8 text: ") as error:
            read(str(tmp_path / name))
        assert "\n" not in str(error.value)


# --- the hub


def table(columns):
    return datasets.Dataset.from_dict(columns).to_iterable_dataset()


def stream(texts_):
    return table({"text": texts_})


@pytest.fixture
def hub(monkeypatch):
    calls = []

    def serve(parts):
        def load(*names, streaming):
            assert streaming
            calls.append(names)
            if isinstance(parts, Exception):
                raise parts
            return parts

        monkeypatch.setattr(datasets, "load_dataset", load)
        return calls

    return serve


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("hub:name", ("name", None)),
        ("hub:name:config", ("name", "config")),
        ("hub:owner/name:config", ("owner/name", "config")),
        ("owner/name", ("owner/name", None)),
    ],
)
def test_hub_names(hub, source, names):
    calls = hub({"train": stream(["a", None, " ", "b"]), "test": stream(["c"])})
    assert read(source) == ["a", "b"]
    assert read(source, "heldout") == ["c"]
    assert set(calls) == {names}


def test_validation_is_held_out_before_test(hub):
    hub({"train": stream(["a"]), "test": stream(["b"]), "validation": stream(["c"])})
    assert read("hub:x", "heldout") == ["c"]


def test_without_a_held_out_split_rows_are_held_out_by_hash(hub):
    rows = [f"row {i}" for i in range(2000)]
    hub({"train": stream(rows)})
    train, held = read("hub:x"), read("hub:x", "heldout")
    assert sorted(train + held) == sorted(rows)
    assert 60 < len(held) < 140


def test_the_only_string_column_is_the_text(hub):
    hub({"train": table({"n": [1], "body": ["a"]})})
    assert [*read("hub:x"), *read("hub:x", "heldout")] == ["a"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            ConnectionError("Couldn't reach it\nlong tale"),
            r"cannot be read: Couldn't reach it \(ch",
        ),
        (
            datasets.exceptions.DatasetNotFoundError(
                "Dataset 'no/such' is a gated dataset on the Hub. You must be authenticated."
            ),
            r"cannot be read: Dataset 'no/such' is a gated dataset on the Hub\. You must be auth",
        ),
        (RuntimeError(), r"cannot be read: RuntimeError \(check its name and the network, or use"),
        ({"dev": None, "all": None}, r"has no split 'train', only dev, all"),
        (
            {"train": table({"a": ["x"], "b": ["y"]})},
            r"no column 'text' and 2 other .*\(columns: a, b\): say which .* 'hub:no/such::b'",
        ),
        ({"train": table({"a": [1]})}, r"no column 'text' and 0 other .*\(columns: a\): give it a"),
    ],
)
def test_hub_errors(hub, parts, message):
    hub(parts)
    with pytest.raises(ValueError, match=r"^hub data set 'no/such' .*" + message) as error:
        read("no/such")
    assert "\n" not in str(error.value)


def test_an_interrupted_stream_is_one_line(hub):
    def rows():
        yield {"text": "a"}
        raise ConnectionError("reset by peer")

    hub({"train": datasets.IterableDataset.from_generator(rows), "test": stream(["a"])})
    with pytest.raises(ValueError, match="cannot be read: reset by peer"):
        read("hub:x")


def test_the_real_library_streams_a_folder(tmp_path):
    for name in ("train", "test"):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(3)])
    assert read(f"hub:{tmp_path}") == ["train 0", "train 1", "train 2"]
    assert read(f"hub:{tmp_path}", "heldout") == ["test 0", "test 1", "test 2"]


def test_paths_win_over_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub("owner/name")
    assert is_hub("hub:owner/name")
    assert not any(map(is_hub, ["docs", "self", "a/b.txt", "../a", "~/a", "a/b/c"]))


# --- the same text from everywhere


def test_an_absolute_source_is_the_same_text_from_any_folder(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, word in [(here, "this"), (there, "that")]:
        (folder / "sub").mkdir(parents=True)
        (folder / "a.txt").write_text(f"{word} text and more words")
        (folder / "sub" / "b.txt").write_text(f"{word} other text and more words")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    kept = {source: absolute(source) for source in ("a.txt", "sub/", "./sub/../a.txt", "~/a.txt")}
    before = {source: everything(source) for source in kept}
    monkeypatch.chdir(there)
    assert {source: everything(path) for source, path in kept.items()} == before
    assert all(path == absolute(path) for path in kept.values())


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        *((name, name) for name in ("docs", "self", "owner/name", "hub:x", "hub:o/n:c:column")),
        ("a.jsonl:body", "/d/a.jsonl:body"),
        ("a.jsonl:body:0.70", "/d/a.jsonl:body:0.70"),
        ("a.jsonl:3 + docs:1", "/d/a.jsonl:3 + docs:1"),
        ("docs + ../b.parquet + owner/name:2", "docs + /b.parquet + owner/name:2"),
        ("typo", "/d/typo"),
        ("", ""),
    ],
)
def test_paths_alone_become_absolute(source, kept, monkeypatch):
    monkeypatch.setattr("os.getcwd", lambda: "/d")
    assert absolute(source) == kept


def test_a_shortened_source_hides_where_files_are():
    assert shortened("/home/me/a.jsonl:body:2 + hub:o/n:c + ~/b.txt") == (
        "a.jsonl:body:2 + hub:o/n:c + b.txt"
    )


def test_a_hub_name_and_a_path_may_name_a_column(hub, tmp_path):
    calls = hub({"train": table({"a": ["x"], "b": ["y"]}), "test": table({"a": ["u"], "b": ["v"]})})
    assert everything("hub:o/n::b") == ["y", "v"] and everything("hub:o/n:c:a") == ["x", "u"]
    assert calls == [("o/n", None)] * 2 + [("o/n", "c")] * 2
    odd = write_lines(tmp_path / "a:b.jsonl", [{"b": "x y z", "c": "u v w"}])
    assert "".join(everything(f"{odd}:c").__str__().split()) == "['uv','w']"
    with pytest.raises(ValueError, match="has no column 'b:c'"):
        read(f"{odd}:b:c")


# --- several sources


def test_a_mixture_is_its_sources_and_weights(tmp_path):
    assert mixture("docs") == [("docs", 1.0)]
    assert mixture("a.jsonl:0.7 + b.jsonl:0.3") == [("a.jsonl", 0.7), ("b.jsonl", 0.3)]
    assert mixture("hub:x:config + hub:y:config:2") == [("hub:x:config", 1.0), ("hub:y:config", 2)]
    odd = tmp_path / "a:1 + b.txt"
    odd.write_text("x")
    assert mixture(str(odd)) == [(str(odd), 1.0)]


@pytest.mark.parametrize("source", ["a:0 + b", "a:-1 + b", "a:nan + b", "a:inf + b", ":0.5 + b"])
def test_a_weight_is_above_0_and_after_a_name(source):
    with pytest.raises(ValueError, match="a weight is a number above 0, after a name"):
        mixture(source)
