"""Random damage to recipes, configurations, weight files and GGUF files; a seed draws the same."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from moe_tools.names import CONFIG, INDEX, SINGLE

DEEP = 100_000
"""Lists inside lists: more than any parser's stack."""
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    3,
    2**31,
    2**63,
    10**30,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../outside",
    "/etc/passwd",
    "nul\0and\ud800",
    "\u202edlrow",
    "x" * 100_000,
    [],
    [[]],
    [1, "a", None],
    {},
    {"kind": "relu"},
    {"a": {"b": [1]}},
    {"__class__": "os.system"},
)
"""What may stand where something else belongs."""


def any_bytes(draw: random.Random, data: bytes) -> bytes:
    """Cuts, flips, repeats or overwrites, mostly where a header is."""
    size = len(data)
    place = draw.randrange(min(size, 400) if draw.random() < 0.7 else size)
    ways: list[Callable[[], bytes]] = [
        lambda: data[:place],
        lambda: b"",
        lambda: data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :],
        lambda: data[:place] + data[place : place + 64] * 3 + data[place:],
        lambda: data[:place] + draw.randbytes(8) + data[place + 8 :],
        lambda: data[:place] + b"\xff" * 8 + data[place + 8 :],
        lambda: data[:place] + struct.pack("<Q", 2 ** draw.randrange(20, 63)) + data[place + 8 :],
        lambda: data + draw.randbytes(64),
    ]
    return draw.choice(ways)()


def any_value(draw: random.Random, block: Any) -> str:
    """Changes one entry of nested lists and mappings in place; says which, and to what."""
    path = []
    while True:
        key = draw.choice(list(block) if isinstance(block, dict) else range(len(block)))
        path.append(str(key))
        inside = block[key]
        if not (isinstance(inside, dict | list) and inside and draw.random() < 0.7):
            break
        block = inside
    if draw.random() < 0.1:
        del block[key]
        return f"{'.'.join(path)} is gone"
    block[key] = draw.choice(VALUES)
    return f"{'.'.join(path)} = {block[key]!r:.60}"


def any_json(draw: random.Random, file: Path) -> str:
    """Another value, or a text that is not quite JSON."""
    text = file.read_text()
    block = json.loads(text)
    key = draw.choice(list(block))
    ways: dict[str, Callable[[], str]] = {
        "twice the same key": lambda: text[: text.rindex("}")] + f', "{key}": [1]}}',
        "deep lists": lambda: f'{{"{key}": {"[" * DEEP}{"]" * DEEP}}}',
        "a number of many digits": lambda: f'{{"{key}": {"9" * 10_000}}}',
        "a list": lambda: f"[{text}]",
        "bytes": lambda: any_bytes(draw, text.encode()).decode(errors="replace"),
    }
    if draw.random() < 0.15:
        way = draw.choice(list(ways))
        file.write_text(ways[way]())
        return f"{file.name}: {way} ({key})"
    said = any_value(draw, block)
    file.write_text(json.dumps(block))
    return f"{file.name}: {said}"


def any_recipe(draw: random.Random, file: Path) -> str:
    """Another value in a recipe, or a text that is not quite YAML."""
    text = file.read_text()
    if draw.random() < 0.2:
        file.write_bytes(any_bytes(draw, text.encode()))
        return "recipe: bytes"
    block = yaml.safe_load(text)
    said = any_value(draw, block)
    file.write_text(yaml.safe_dump(block))
    return f"recipe: {said}"


def any_block(draw: random.Random, file: Path) -> str:
    """Another value in the block of `config.json` that is ours."""
    config = json.loads(file.read_text())
    said = any_value(draw, config["moe_tools"])
    file.write_text(json.dumps(config))
    return f"the block: {said}"


def any_header(draw: random.Random, file: Path) -> str:
    """Another value in the header of a safetensors file, with a length that fits it or does not."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    said = any_value(draw, header)
    text = json.dumps(header).encode()
    said_length = len(text) if draw.random() < 0.8 else 2 ** draw.randrange(2, 63)
    file.write_bytes(said_length.to_bytes(8, "little") + text + body)
    return f"{file.name}: {said}, a header of {said_length}"


def any_file(draw: random.Random, file: Path) -> str:
    """Other bytes."""
    file.write_bytes(any_bytes(draw, file.read_bytes()))
    return f"{file.name}: bytes"


Damage = Callable[[random.Random, Path], str]
"""Changes a file, and says what it changed."""

OF_FOLDER: tuple[tuple[str, Damage], ...] = (
    (CONFIG, any_json),
    (CONFIG, any_json),
    (CONFIG, any_block),
    (CONFIG, any_block),
    (SINGLE, any_header),
    (SINGLE, any_file),
    ("tokenizer.json", any_json),
    ("tokenizer_config.json", any_json),
    ("generation_config.json", any_json),
)
"""Files of a converted folder, and what is done to them."""
OF_SHARDS: tuple[tuple[str, Damage], ...] = (
    (INDEX, any_json),
    ("model-00001-of-00002.safetensors", any_header),
)
