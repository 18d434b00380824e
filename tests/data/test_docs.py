import itertools
import os
import re
import subprocess
import sys
import time

import pytest

import moe_tools.data.docs as module
from moe_tools.data import texts
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
    names = (f"fake_corpus/m{i}.py" for i in itertools.count())
    return (name for name in names if is_held_out(name) == held_out)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """An installed package with the given files; its name is all that is real about it."""
    package, info = tmp_path / "fake_corpus", tmp_path / "fake_corpus-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-corpus\nVersion: 1.0\n")
    (package / "__init__.py").write_text("raise ImportError('never import me')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "PACKAGES", {"fake-corpus": "fake_corpus"})
    monkeypatch.setattr(module, "TOPICS", "fake_corpus/topics.py")

    def add(name, source):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        return path

    return add


def test_every_kind_of_docstring_is_read_in_order(fake):
    one, two, three, four, five = map(prose, ["one", "two", "three", "four", "five"])
    name = next(file_names(held_out=False))
    fake(
        name,
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
        f"not_a_docstring = '''{prose('x')}'''\n",
    )
    assert [normalise(t) for t in module.docs("train")] == [
        normalise(t) for t in (one, two, three, four, five)
    ]
    assert module.docs("heldout") == []


def test_topics_tests_and_broken_files(fake):
    fake("fake_corpus/topics.py", f"topics = {{'a': {prose('a')!r}, 'b': 'short'}}\n")
    fake("fake_corpus/tests/x.py", f'"""{prose("t")}"""')
    fake("fake_corpus/test_x.py", f'"""{prose("u")}"""')
    fake("fake_corpus/new_syntax.py", f'"""{prose("v")}"""\nprint 1')
    fake("fake_corpus/surrogate.py", f'"""{prose("w")} \\ud800"""')
    found = module.docs("train") + module.docs("heldout")
    assert sorted(text.split()[3] for text in found) == ["a", "w"]
    assert all(text.encode() for text in found)


def test_train_shares_no_paragraph_and_no_long_line_with_heldout(fake):
    shared, own = prose("shared"), prose("own")
    held_name, train_name = next(file_names(True)), next(file_names(False))
    fake(held_name, f'"""{shared}"""')
    line = shared.splitlines()[0]
    fake(
        train_name,
        f'"""{shared.upper()}"""\n'
        f"def a():\n    '''Head.\n\n    {shared}\n\n    {own}\n    '''\n"
        f"def b():\n    '''{line}\n    {prose('b')}'''\n"
        f"def c():\n    '''{own}\n\n    {prose('c')}'''\n",
    )
    assert module.docs("heldout") == [shared]
    assert [normalise(text) for text in module.docs("train")] == [
        normalise("Head. " + own),
        normalise(prose("c")),
    ]


def test_whole_files_are_held_out(fake):
    for name in itertools.chain(
        itertools.islice(file_names(True), 3), itertools.islice(file_names(False), 9)
    ):
        parts = "".join(f"def f{i}():\n    '''{prose(f'{name}:{i}')}'''\n" for i in range(3))
        fake(name, parts)
    for split, count in (("heldout", 3), ("train", 9)):
        documents = module.docs(split)
        names = {text.split()[3].split(":")[0] for text in documents}
        assert len(documents) == 3 * count and len(names) == count
        assert {is_held_out(name) for name in names} == {split == "heldout"}


def test_the_cache_is_used_repaired_and_keyed_by_version(fake, tmp_path, monkeypatch):
    path = fake(next(file_names(False)), f'"""{prose("old")}"""')
    expected = module.docs("train")
    path.write_text(f'"""{prose("new")}"""')
    assert module.docs("train") == expected
    files = sorted((tmp_path / "cache" / "moe_tools").iterdir())
    assert [file.name.split("-")[-1] for file in files] == ["heldout.jsonl", "train.jsonl"]
    for damaged in (b"", b"{}", files[1].read_bytes()[:-9], b"\xff"):
        files[1].write_bytes(damaged)
        assert module.docs("train") == [prose("new")]
    path.write_text(f'"""{prose("newer")}"""')
    assert module.docs("train") == [prose("new")]
    monkeypatch.setattr(module, "RULES", module.RULES + 1)
    assert module.docs("train") == [prose("newer")]
    assert len(list((tmp_path / "cache" / "moe_tools").iterdir())) == 4


def test_a_cache_that_cannot_be_written_is_a_warning(fake, tmp_path, caplog):
    fake(next(file_names(False)), f'"""{prose("a")}"""')
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert module.docs("train") == [prose("a")]
    assert "cannot cache the docs corpus" in caplog.messages[0]


def test_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, expected in [
        ("", tmp_path / ".cache"),
        ("relative", tmp_path / ".cache"),
        (str(tmp_path / "x"), tmp_path / "x"),
    ]:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert module._cache_folder() == expected / "moe_tools"


def test_missing_packages_are_named(monkeypatch):
    packages = {"numpy": "numpy", "no-such-package": "nothing", "nor-this": "nothing"}
    monkeypatch.setattr(module, "PACKAGES", packages)
    with pytest.raises(ValueError) as error:
        texts("docs", split="train")
    assert str(error.value) == (
        "source 'docs' reads the docstrings of installed packages, and there is no "
        "no-such-package, nor-this: pip install no-such-package nor-this, or use a text file as "
        "data"
    )


# --- the real corpus: about 20 s for the first look


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield {split: list(texts("docs", split=split)) for split in ("heldout", "train")}


@pytest.mark.slow
def test_the_corpus_is_large_clean_and_cached(corpus):
    sizes = {split: sum(map(len, documents)) for split, documents in corpus.items()}
    assert sizes["train"] > 10e6
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
import hashlib
from moe_tools.data import texts
for split in ("train", "heldout"):
    print(hashlib.sha256("\\0".join(texts("docs", split=split)).encode()).hexdigest())
"""


@pytest.mark.slow
def test_processes_with_other_hash_seeds_read_the_same_corpus(corpus, tmp_path):
    printed = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": seed, "XDG_CACHE_HOME": cache},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        # One process reads the sources again, the other the cache.
        for seed, cache in (("1", str(tmp_path)), ("2", os.environ["XDG_CACHE_HOME"]))
    ]
    assert len(set(printed)) == 1 and len(printed[0].split()) == 2
