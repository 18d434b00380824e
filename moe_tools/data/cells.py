"""What a cell of a table says: text, or the turns of a conversation as JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

PAIR = ("prompt", "completion")
"""Columns that together are a question and its answer."""


def string(row: Mapping[str, Any], column: str, where: str) -> str | None:
    """A row's text; None: it is null.

    Raises:
        ValueError: it is missing, no string, or no Unicode.
    """
    text = row.get(column)
    if text is None and column in row:
        return None
    if not isinstance(text, str):
        raise ValueError(f'{where} has no string "{column}": every row must have one, or null')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f'{where} has half of a surrogate pair in "{column}": repair it'
        ) from error
    return text


def turns(row: Mapping[str, Any], column: str, where: str) -> str | None:
    """A row's conversation as JSON: a list of objects with `role` and `content`; None: it is null.

    `from` and `value`, with human and gpt, are the older names of the same.

    Raises:
        ValueError: it is missing, or no list of turns.
    """
    found = row.get(column)
    if found is None and column in row:
        return None
    if found == []:
        return None
    if not isinstance(found, list) or not all(map(is_turn, found)):
        raise ValueError(
            f"{where} has no turns in {column!r}: every row must have a list of "
            '{"role": ..., "content": ...}, or null'
        )
    return json.dumps([_turn(turn, where) for turn in found], ensure_ascii=True)


def words(document: str) -> str:
    """What the turns of a conversation, or a prompt and its completion, say one after another."""
    read = json.loads(document)
    if isinstance(read, dict):
        return "\n".join(read.values())
    return "\n".join(f"{turn['role']} {turn['content']}" for turn in read)


def pair(row: Mapping[str, Any], where: str) -> str | None:
    """A row's prompt and completion as JSON; None: one of them is null.

    Raises:
        ValueError: one is missing or no string.
    """
    prompt, completion = (string(row, column, where) for column in PAIR)
    if prompt is None or completion is None:
        return None
    return json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=True)


def has_turns(names: Collection[str]) -> bool:
    """Whether rows of a list with these fields are turns of a conversation."""
    return {"role", "content"} <= set(names) or {"from", "value"} <= set(names)


ROLES = {"human": "user", "gpt": "assistant"}
"""Roles under older names."""


def is_turn(turn: Any) -> bool:
    """Whether a value is a turn of a conversation, under the usual or the older names."""
    return isinstance(turn, dict) and has_turns(turn)


def _turn(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A turn under its usual names, without fields that are null: templates ask what is there."""
    if "role" not in turn:
        role = turn["from"]
        return {"role": ROLES.get(role, role), "content": _content(turn["value"], {}, where)}
    kept = {key: value for key, value in turn.items() if value is not None}
    return {**kept, "content": _content(turn["content"], kept, where)}


def _content(content: Any, turn: Mapping[str, Any], where: str) -> str:
    """What a turn says: a string, or parts of text that are joined.

    Raises:
        ValueError: pictures, numbers or nothing, which a template would write as it likes.
    """
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        content = "".join(str(part.get("text", "")) for part in content)
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise ValueError(
            f"{where} has a turn whose content is {str(content)[:40]!r}: it must be a string, or "
            "parts of text"
        )
    return string({"content": content}, "content", where) or ""
