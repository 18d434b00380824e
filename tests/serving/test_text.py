"""Text comes in pieces that together are the whole, and ends before a stop string."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_tools.serving.text import Writer
from tests.tiny import build_tokenizer


def of_bytes() -> PreTrainedTokenizerFast:
    """A token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def pieces(tokenizer: PreTrainedTokenizerFast, tokens: list[int], *stops: str) -> list[str]:
    writer = Writer(tokenizer, stops)
    said = []
    for token in tokens:
        said.append(writer.add(token))
        if writer.stopped:
            break
    return [*said, writer.rest()]


def test_words_come_one_by_one() -> None:
    tokenizer = build_tokenizer()
    assert pieces(tokenizer, [3, 4, 5]) == ["w0", " w1", " w2", ""]


def test_special_tokens_say_nothing() -> None:
    assert "".join(pieces(build_tokenizer(), [3, 1, 4, 2, 2])) == "w0 w1"


@pytest.mark.parametrize("text", ["Grüße, 世界! 🙂🙃 e\u0301", "a\ufffdb"])
def test_no_piece_holds_a_part_of_a_character(text: str) -> None:
    tokenizer = of_bytes()
    said = pieces(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(said) == text
    assert "\ufffd" not in "".join(said) or "\ufffd" in text


def test_broken_characters_do_not_hold_a_text_back() -> None:
    tokenizer = of_bytes()
    broken = tokenizer("é")["input_ids"][1:] * 40
    said = pieces(tokenizer, broken)
    assert len([each for each in said if each]) > 1
    assert "".join(said).count("\ufffd") == 40


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (("STOP",), "one ST two "),
        (("S",), "one "),
        (("STOP", "two"), "one ST "),
        (("nowhere", "OP t"), "one ST two ST"),
        (("end",), "one ST two STOP three"),
        (("threeX",), "one ST two STOP three"),
    ],
)
def test_a_stop_string_is_met_wherever_its_tokens_part(
    stops: tuple[str, ...], expected: str
) -> None:
    tokenizer = of_bytes()
    said = pieces(tokenizer, tokenizer("one ST two STOP three")["input_ids"], *stops)
    assert "".join(said) == expected
