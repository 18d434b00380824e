"""A vocabulary of sixty words, its tokenizer and texts of it; how a test calls the command line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{index}" for index in range(60)]
Run = Callable[..., tuple[int, str, str]]
"""Words of a command line -> exit code, standard output, standard error."""


def build_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """A token a word; the first word is token 3."""
    vocabulary = {word: index for index, word in enumerate(["[UNK]", "[EOS]", "[MASK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]", mask_token="[MASK]"
    )


def passages(count: int) -> list[str]:
    """Thirty random words each; a longer list begins like a shorter one."""
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=30)) for _ in range(count)]


def write_passages(file: Path, count: int) -> None:
    """Passages with an empty line between two."""
    file.write_text("\n\n".join(passages(count)))


EVALUATE = ("--data", "text.txt", "--tokens", "128", "--block-length", "16", "--dtype", "fp32")


def rows_of(run: Run, *words: str) -> list[dict[str, Any]]:
    """What `moe-tools evaluate` measures on text.txt."""
    code, out, _ = run("evaluate", *words, *EVALUATE, "--json", "-")
    assert code == 0
    return json.loads(out)


def build_pair_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """As BERT's: [CLS] one [SEP] other [SEP], with the types of tokens; the first word is 4."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> str:
    """A .jsonl file of these rows; its path."""
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)
