"""The preparation that people write with `datasets`: load, filter, map and save rows as JSON Lines.

Run by `prepare` in a process of its own. It keeps what the legacy filter keeps: every text is lower-cased once, and the
phrases are looked for one after the other. `rows` calls a function for each row, which is what the library's manual
begins with; `batched` hands over a thousand rows at a time.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import datasets

PHRASES = [phrase.lower() for phrase in pathlib.Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]


def is_kept(row: dict[str, Any]) -> bool:
    """Return whether no phrase stands in a row's instruction or output."""
    instruction, output = row["instruction"].lower(), row["output"].lower()
    return not any(phrase in instruction or phrase in output for phrase in PHRASES)


def convert(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as messages."""
    user = {"role": "user", "content": row["instruction"], "input": row["input"]}
    return {"messages": [user, {"role": "assistant", "content": row["output"], "input": ""}]}


def _list_rows(batch: dict[str, list[str]]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def is_kept_batch(batch: dict[str, list[str]]) -> list[bool]:
    """Return the same for many rows."""
    return [is_kept(row) for row in _list_rows(batch)]


def convert_batch(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
    """Return many rows as messages."""
    return {"messages": [convert(row)["messages"] for row in _list_rows(batch)]}


def main() -> None:
    """Prepare SOURCE into OUT, keeping the library's files in CACHE."""
    source, out, cache, style, processes = sys.argv[2:]
    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=cache)
    batched = style == "batched"
    filtered = rows.filter(is_kept_batch if batched else is_kept, batched=batched, num_proc=int(processes))
    messages = filtered.map(
        convert_batch if batched else convert,
        batched=batched,
        num_proc=int(processes),
        remove_columns=rows.column_names,
    )
    messages.to_json(out, num_proc=int(processes), force_ascii=False)


if __name__ == "__main__":
    main()
