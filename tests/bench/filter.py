"""Rows a second through the filter on one core, beside the old scripts' loop and one compiled regular expression.

    python -m tests.bench.filter [--rows N] [--rounds N]

In legacy mode all arms have to give the same verdict for every row, or there is no result. Every arm judges the same
rows in every round, one after the other; the fastest round of each counts. Time is the processor time of this one
thread, so that what else the machine does counts as little as it can.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import os
import random
import re
import sys
import time
from collections.abc import Callable, Sequence

from finetune_contract.run_config import FilterConfig
from finetune_trainer.data.formats import Conversation, parse_row
from finetune_trainer.data.phrase_search import PhraseSearch
from finetune_trainer.data.refusals import make_filter
from finetune_trainer.data.rules import Example, read_legacy_phrases, read_rules
from tests.bench.results import Result, write_results
from tests.demo.corpus import DISCLAIMERS, REFUSALS, list_documented

ROW_CHARACTERS = 2000
LONG_LIST = 224
"""Entries in the list of the recipe's script."""
REFUSED, DISCLAIMED, FALSE_ALARM, CURLY = 0.08, 0.04, 0.04, 0.1
"""Shares of rows: short refusals, disclaimers before a text, innocent words that old lists strike, curly quotes."""
INNOCENT = (
    "Biodiversity is higher near the river. ",
    "This is an unbiased estimator. ",
    "It was used as an aid to memory. ",
)

Judge = Callable[[int], bool]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The same rows as a script reads them and as the filter gets them."""

    texts: list[tuple[str, str]]
    """(instruction, output)."""
    conversations: list[Conversation]


@dataclasses.dataclass
class Arm:
    """One way to judge rows, and how long it took."""

    name: str
    judge: Judge
    seconds: float = float("inf")
    num_removed: int = 0

    def run(self, num_rows: int) -> None:
        """Judge the first rows once."""
        begin = time.process_time()
        removed = sum(map(self.judge, range(num_rows)))
        self.seconds = min(self.seconds, time.process_time() - begin)
        self.num_removed = removed


def make_rows(num_rows: int, seed: int = 7) -> Rows:
    """Build rows of about 2,000 characters from Python's own documentation, with planted refusals."""
    chooser = random.Random(seed)
    documented = sorted(set(list_documented()))
    rows = [
        (f"What does `{chooser.choice(documented)[0]}` do?", _make_answer(documented, chooser)) for _ in range(num_rows)
    ]
    pairs = [{"instruction": instruction, "output": output} for instruction, output in rows]
    return Rows(rows, [parse_row(pair, "evol", {}) for pair in pairs])


def _make_answer(documented: Sequence[tuple[str, str]], chooser: random.Random) -> str:
    kind = chooser.random()
    if kind < REFUSED:
        return chooser.choice(REFUSALS)
    parts, length = [], 0
    while length < ROW_CHARACTERS:
        parts.append(chooser.choice(documented)[1])
        length += len(parts[-1]) + 2
    text = "\n\n".join(parts)[:ROW_CHARACTERS]
    if chooser.random() < CURLY:
        text = text.replace("'", "\u2019")
    if kind < REFUSED + DISCLAIMED:
        return chooser.choice(DISCLAIMERS) + text
    if kind < REFUSED + DISCLAIMED + FALSE_ALARM:
        return text + "\n\n" + chooser.choice(INNOCENT)
    return text


def make_long_list() -> list[str]:
    """Return a list as long as the recipe's: the built-in one, and openings of what the rules have to match."""
    examples = [one for language in ("en", "es", "fr") for rule in read_rules(language) for one in rule.match]
    # Those that need no request of their own: what came with requests came later, and the list stays as it was.
    alone = [one.answer for one in examples if one == Example(one.answer)]
    openings = [" ".join(answer.split()[:5]) for answer in alone]
    return list(dict.fromkeys([*read_legacy_phrases(), *openings]))[:LONG_LIST]


def make_legacy_arms(rows: Rows, phrases: Sequence[str]) -> list[Arm]:
    """Return our legacy mode, the old scripts' loop, and one alternation of all phrases."""
    texts, conversations = rows.texts, rows.conversations
    ours = make_filter(FilterConfig(rules="legacy"), phrases)
    pattern = re.compile("|".join(re.escape(phrase.lower()) for phrase in phrases))

    def judge(index: int) -> bool:
        return ours.judge(conversations[index]).removal is not None

    def loop(index: int) -> bool:
        instruction, output = texts[index]
        return any(phrase.lower() in instruction.lower() or phrase.lower() in output.lower() for phrase in phrases)

    def search(index: int) -> bool:
        instruction, output = texts[index]
        return bool(pattern.search(instruction.lower()) or pattern.search(output.lower()))

    return [Arm("legacy", judge), Arm("loop", loop), Arm("regex", search)]


def make_search_arms(rows: Rows, phrases: Sequence[str]) -> list[Arm]:
    """Return the searches alone: the automaton that we use, and pyahocorasick where it is installed."""
    lowered = [phrase.lower() for phrase in phrases]
    texts = [output for _, output in rows.texts]
    ours = PhraseSearch(lowered)
    arms = [Arm("search", lambda index: bool(ours.list_hits(texts[index].lower())))]
    with contextlib.suppress(ImportError):
        import ahocorasick

        automaton = ahocorasick.Automaton()
        for phrase in lowered:
            automaton.add_word(phrase, len(phrase))
        automaton.make_automaton()
        arms.append(Arm("pyahocorasick", lambda index: bool(list(automaton.iter(texts[index].lower())))))
    return arms


def measure_searches(rows: Rows, phrases: Sequence[str], arguments: argparse.Namespace) -> list[Result]:
    """Measure the automaton beside the one that was not chosen."""
    arms = make_search_arms(rows, phrases)
    compare(arms, arguments.sample, arguments.rounds)
    other = arms[1:]
    rates = [arguments.sample / arm.seconds for arm in arms]
    if not other:
        return [Result("search_rows_per_second", rates[0], "rows/s")]
    return [Result("search_rows_per_second", rates[0], "rows/s", other[0].name, rates[1])]


def make_rules_arm(rows: Rows) -> Arm:
    """Return the default rules."""
    ours = make_filter(FilterConfig())
    return Arm("rules", lambda index: ours.judge(rows.conversations[index]).removal is not None)


def compare(arms: Sequence[Arm], num_rows: int, num_rounds: int) -> None:
    """Time all arms in turns, over the same rows."""
    for _ in range(num_rounds):
        for arm in arms:
            arm.run(num_rows)


def find_difference(one: Arm, other: Arm, num_rows: int) -> int | None:
    """Return the first row of which two arms think differently."""
    return next((index for index in range(num_rows) if one.judge(index) != other.judge(index)), None)


def measure_list(rows: Rows, phrases: Sequence[str], arguments: argparse.Namespace) -> list[Result]:
    """Measure every arm beside the loop over one list of phrases."""
    arms = make_legacy_arms(rows, phrases)
    ours, loop, regex = arms
    for other in (loop, regex):
        index = find_difference(ours, other, arguments.sample)
        if index is not None:
            raise SystemExit(f"{ours.name} and {other.name} differ over row {index}: {rows.texts[index]}")
    rules = make_rules_arm(rows)
    compare([*arms, rules], arguments.sample, arguments.rounds)
    rates = {arm.name: arguments.sample / arm.seconds for arm in (*arms, rules)}
    baseline = f"loop over {len(phrases)} phrases"
    mark = "" if len(phrases) == LONG_LIST else f"_{len(phrases)}_phrases"
    names = {"legacy": f"rows_per_second{mark}", "rules": f"rules_rows_per_second{mark}"}
    names["regex"] = f"regex_rows_per_second{mark}"
    return [Result(names[name], rates[name], "rows/s", baseline, rates["loop"]) for name in names]


def main(argv: Sequence[str]) -> int:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.filter", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=70_000, help="rows of the whole pass")
    parser.add_argument("--sample", type=int, default=3_500, help="rows that every arm judges in each round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the fastest counts")
    arguments = parser.parse_args(argv)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = make_rows(arguments.rows)
    # A preparation streams its rows; here they all lie in memory, and no arm is to pay for walking over them.
    gc.freeze()
    lists = [make_long_list(), list(read_legacy_phrases())]
    results = [result for phrases in lists for result in measure_list(rows, phrases, arguments)]
    results += measure_searches(rows, lists[0], arguments)
    whole = [make_legacy_arms(rows, lists[0])[0], make_rules_arm(rows)]
    compare(whole, arguments.rows, 2)
    for arm in whole:
        results.append(Result(f"{arm.name}_seconds", arm.seconds, f"s for {arguments.rows} rows"))
        results.append(Result(f"{arm.name}_removed_share", arm.num_removed / arguments.rows, "of the rows"))
    write_results("filter", results, phrases=[len(phrases) for phrases in lists])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
