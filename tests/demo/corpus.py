"""Instruction rows made from the documentation that every Python carries: its docstrings.

Used by the demo and by cluster tests as real text. Rows are in alpaca format; written refusals and disclaimers are
mixed in at known positions, so that a test can say what the filter has to find. Nothing is downloaded.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import inspect
import pathlib
import random
import sysconfig
from collections.abc import Iterator

MAX_ANSWER_CHARS = 700
"""Longer documentation is cut at a sentence or line, so that a row fits a short context."""

SKIPPED_PACKAGES = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "__pycache__", "ensurepip"}
BUILTIN_TYPES = (str, bytes, bytearray, int, float, complex, list, tuple, dict, set, frozenset, range, memoryview)

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "As an AI language model, I cannot provide information about this topic.",
    "I apologize, but I am not able to assist with that request.",
    "I\u2019m sorry, but as an AI I can\u2019t answer that question.",
    "I cannot fulfill this request. Please consult a qualified professional.",
    "Unfortunately, I am unable to help you with this.",
)

DISCLAIMERS = (
    "As an AI language model, I do not have personal opinions. ",
    "As an AI language model, my knowledge only goes up to September 2021. ",
)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Rows and what was put into them."""

    rows: list[dict[str, str]]
    planted: frozenset[int]
    """Indexes of the rows that the filter has to remove."""


def make_corpus(num_rows: int, *, seed: int = 7, planted_share: float = 0.04) -> Corpus:
    """Build `num_rows` alpaca rows, of which `planted_share` refuse or disclaim."""
    documented = sorted(set(list_documented()))
    chooser = random.Random(seed)
    chooser.shuffle(documented)
    num_planted = int(num_rows * planted_share)
    if len(documented) < num_rows:
        raise ValueError(f"this Python documents only {len(documented)} names; ask for fewer than {num_rows} rows")
    planted = frozenset(chooser.sample(range(num_rows), num_planted))
    rows = []
    for index, (name, text) in enumerate(documented[:num_rows]):
        output = _spoil(text, chooser) if index in planted else text
        rows.append({"instruction": f"What does `{name}` do?", "input": "", "output": output})
    return Corpus(rows, planted)


def _spoil(text: str, chooser: random.Random) -> str:
    if chooser.random() < 0.7:
        return chooser.choice(REFUSALS)
    return chooser.choice(DISCLAIMERS) + text


def list_documented() -> Iterator[tuple[str, str]]:
    """Yield (qualified name, documentation) of built-in and standard library names."""
    for name, value in vars(builtins).items():
        if not name.startswith("_") and callable(value):
            yield from _pair(name, inspect.getdoc(value))
    for kind in BUILTIN_TYPES:
        for name in vars(kind):
            if not name.startswith("_"):
                yield from _pair(f"{kind.__name__}.{name}", inspect.getdoc(getattr(kind, name)))
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if SKIPPED_PACKAGES.isdisjoint(parts) and not any(part.startswith("_") for part in parts):
            yield from _documented_in(path, ".".join(parts))


def _documented_in(path: pathlib.Path, module: str) -> Iterator[tuple[str, str]]:
    """Read a module's docstrings from its source: importing all of the library would run its side effects."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    stack: list[tuple[str, ast.AST]] = [(module, tree)]
    while stack:
        prefix, node = stack.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if child.name.startswith("_"):
                    continue
                name = f"{prefix}.{child.name}"
                yield from _pair(name, ast.get_docstring(child))
                if isinstance(child, ast.ClassDef):
                    stack.append((name, child))


def _pair(name: str, documentation: str | None) -> Iterator[tuple[str, str]]:
    text = (documentation or "").strip()
    if len(text) > MAX_ANSWER_CHARS:
        cut = max(text.rfind(end, 0, MAX_ANSWER_CHARS) for end in (". ", ".\n", "\n"))
        text = text[: cut + 1].strip() if cut > 0 else text[:MAX_ANSWER_CHARS]
    if len(text) >= 20:
        yield name, text
