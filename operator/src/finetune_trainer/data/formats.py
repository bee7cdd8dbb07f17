"""Rows in the formats people have, turned into one shape: a conversation of messages.

alpaca `{instruction, input, output}`, evol (the same without input), sharegpt `{conversations: [{from, value}]}` and
messages `{messages: [{role, content}]}`. Pure: reading files is `rows`, judging the text is `refusals`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

FORMATS = ("alpaca", "evol", "sharegpt", "messages")

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}
_MESSAGE_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


_SHOWN = 40
"""Characters of a value that a message shows."""


class RowError(ValueError):
    """The row cannot be turned into a conversation; the message says which field is at fault."""


# Not frozen, though nobody changes them: each row makes several, and a frozen one takes ten times as long to make.
@dataclasses.dataclass(slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    """system, user or assistant."""
    content: str
    field: str
    """Where the content stood in the source row, as in `output` or `conversations[1].value`."""
    input: str = ""
    """Alpaca's input, which templates place beside the instruction."""
    input_field: str = ""

    def to_message(self) -> dict[str, str]:
        """Return the message as it is stored in the prepared data."""
        message = {"role": self.role, "content": self.content}
        if self.input:
            message["input"] = self.input
        return message


@dataclasses.dataclass(slots=True)
class Conversation:
    """One row in our own shape."""

    turns: tuple[Turn, ...]

    def to_messages(self) -> list[dict[str, str]]:
        """Return the messages as they are stored in the prepared data."""
        return [turn.to_message() for turn in self.turns]


def detect_format(row: Any, fields: Mapping[str, str]) -> str | None:
    """Return the format of a row, or None when its keys fit none."""
    if not isinstance(row, dict):
        return None
    if fields.get("conversations", "conversations") in row:
        return "sharegpt"
    if fields.get("messages", "messages") in row:
        return "messages"
    if fields.get("instruction", "instruction") in row and fields.get("output", "output") in row:
        return "alpaca" if fields.get("input", "input") in row else "evol"
    return None


def parse_row(row: Any, format_name: str, fields: Mapping[str, str]) -> Conversation:
    """Turn one row into a conversation. Raises RowError."""
    if not isinstance(row, dict):
        raise RowError(f"expected an object, found {_kind(row)}")
    if format_name in ("alpaca", "evol"):
        return _parse_instruction_row(row, fields)
    if format_name == "sharegpt":
        key = fields.get("conversations", "conversations")
        return _parse_turns(row, key, ("from", "value"), _SHAREGPT_ROLES)
    key = fields.get("messages", "messages")
    return _parse_turns(row, key, ("role", "content"), _MESSAGE_ROLES)


def _parse_instruction_row(row: Mapping[str, Any], fields: Mapping[str, str]) -> Conversation:
    name, input_name = fields.get("instruction", "instruction"), fields.get("input", "input")
    instruction = _read_text(row, name)
    output = _read_text(row, fields.get("output", "output"))
    # evol rows have no input; one that has is not robbed of it.
    added = _read_text(row, input_name) if row.get(input_name) is not None else ""
    if not instruction or instruction.isspace():
        if not added.strip():
            raise RowError(f"{name} is empty")
        instruction, added = added, ""
    user = Turn("user", instruction, "instruction", added, "input" if added else "")
    return Conversation((user, Turn("assistant", output, "output")))


def _parse_turns(
    row: Mapping[str, Any], key: str, turn_keys: tuple[str, str], roles: Mapping[str, str]
) -> Conversation:
    if key not in row:
        raise RowError(f"{key} is missing; found {list_keys(row)}")
    items = row[key]
    if not isinstance(items, list):
        raise RowError(f"{key}: expected a list, found {_kind(items)}")
    if not items:
        raise RowError(f"{key} is empty")
    role_key, text_key = turn_keys
    turns = []
    for index, item in enumerate(items):
        path = f"{key}[{index}]"
        if not isinstance(item, dict):
            raise RowError(f"{path}: expected an object, found {_kind(item)}")
        role = item.get(role_key)
        if not isinstance(role, str) or role.lower() not in roles:
            raise RowError(f"{path}.{role_key}: expected one of {', '.join(roles)}, found {_shorten(role)}")
        turns.append(Turn(roles[role.lower()], _read_content(item, text_key, path), f"{path}.{text_key}"))
    return Conversation(tuple(turns))


def _read_content(item: Mapping[str, Any], key: str, path: str) -> str:
    parts = item.get(key)
    if not isinstance(parts, list):
        return _read_text(item, key, f"{path}.")
    texts = []
    for index, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RowError(f"{path}.{key}[{index}]: only parts of type text can be trained on")
        texts.append(_read_text(part, "text", f"{path}.{key}[{index}]."))
    return "".join(texts)


def _read_text(row: Mapping[str, Any], key: str, path: str = "") -> str:
    if key not in row:
        raise RowError(f"{path}{key} is missing; found {list_keys(row)}")
    value = row[key]
    if not isinstance(value, str):
        raise RowError(f"{path}{key}: expected text, found {_kind(value)}")
    if value.isascii():
        return value
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{path}{key}: half a surrogate pair at character {error.start}") from None
    return value


def _shorten(value: Any) -> str:
    """Return a value for a message, however long it is."""
    if not isinstance(value, str):
        return _kind(value)
    return repr(value) if len(value) <= _SHOWN else f"{value[:_SHOWN]!r}..."


def list_keys(row: Any) -> str:
    """Return the names of a row's first keys for a message, whatever characters they hold."""
    if not isinstance(row, dict):
        return _kind(row)
    keys = [str(key)[:40].encode("utf-8", "backslashreplace").decode() for key in row][:8]
    return ", ".join(keys) if keys else "no keys"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
