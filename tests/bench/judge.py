"""`make bench-judge`: what a trained judge adds to the rules, on rows that neither was made by.

A judge is trained from MiniLM, as `finetune-trainer judge train` does it, on the sets of the filter that rules were
mended by and on ordinary rows (Python's documentation), once for each seed. It then judges the two sets that nobody has
mended anything by, as `prepare --judge` would: alone, beside the rules on the rows they doubt, and on all they keep.
`--choose` is what epochs, layers and threshold were chosen by: thirds of the development set, each judged by a judge
that was trained on the others. Single rows of the unseen sets are never printed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from finetune_contract.run_config import FilterConfig, JudgeConfig
from finetune_trainer.data.findings import Verdict
from finetune_trainer.data.formats import Conversation, Turn
from finetune_trainer.data.judge import make_finding, select
from finetune_trainer.data.labelled import read_labelled as read_training_rows
from finetune_trainer.data.refusals import make_filter
from finetune_trainer.judge_training import JudgeTraining, train_judge
from tests.bench import judge_base
from tests.bench.filter_quality import MENDED_BY, SETS, Judged, Labelled, read_labelled, score
from tests.bench.results import REPOSITORY, Result, write_results
from tests.demo.corpus import make_corpus

if TYPE_CHECKING:
    from finetune_trainer.classifier import Classifier

TEXT = "{instruction} [SEP] {output}"
"""What is judged; [SEP] is how the base tells two texts apart."""
HOW = JudgeTraining(epochs=4, learning_rate=1e-4, max_length=160, frozen_layers=2)
THRESHOLDS = (0.5, 0.9)
NUM_ORDINARY = 100
"""Ordinary rows to train on; as many others, and more, are judged."""
NUM_JUDGED = 200
FOLDS = 3
ROLES = REPOSITORY.parent / "shared" / "data" / "gpteacher-roleplay" / "roleplay.json"
DEBIAN = pathlib.Path("/usr/share/doc")


def list_ordinary() -> list[Conversation]:
    """Return rows of Python's documentation, in one order."""
    rows = make_corpus(NUM_ORDINARY + NUM_JUDGED, planted_share=0.0).rows
    return [_make_row(row["instruction"], row["output"]) for row in rows]


def list_roles() -> list[Conversation]:
    """Return answers in a role, where they are at hand."""
    if not ROLES.is_file():
        return []
    rows = json.loads(ROLES.read_text(encoding="utf-8"))
    chosen = random.Random(0).sample(rows, min(NUM_JUDGED, len(rows)))
    return [_make_row(f"{row['instruction']}\n{row.get('input', '')}".strip(), row["output"]) for row in chosen]


def list_paragraphs() -> list[Conversation]:
    """Return paragraphs of the documentation that this machine's packages bring."""
    paths = sorted(path for path in DEBIAN.glob("*/*") if path.name.startswith("README") and path.suffix != ".gz")
    found = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        found += [" ".join(part.split()) for part in text.split("\n\n") if len(part) > 80]
    chosen = random.Random(0).sample(sorted(set(found)), min(NUM_JUDGED, len(set(found))))
    return [_make_row("Go on.", text) for text in chosen]


def _make_row(instruction: str, output: str) -> Conversation:
    return Conversation((Turn("user", instruction, "instruction"), Turn("assistant", output, "output")))


def train(rows: Sequence[Labelled], ordinary: Sequence[Conversation], how: JudgeTraining) -> Classifier:
    """Return a judge that was trained on labelled rows and on ordinary ones, which are kept."""
    both = [(row.conversation, row.is_removal) for row in rows] + [(row, False) for row in ordinary]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "labelled.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for conversation, is_removal in both:
                row = {"messages": conversation.to_messages(), "label": "remove" if is_removal else "keep"}
                file.write(json.dumps(row) + "\n")
        return train_judge(read_training_rows([path], TEXT, seed=0), judge_base.fetch_base(), how)


def decide(verdicts: Sequence[Verdict], scores: Sequence[float], rows: str, threshold: float) -> list[bool]:
    """Return which rows go, as `prepare` decides; `scores` are the judge's of all rows; "" has no judge."""
    config = JudgeConfig("judge", rows=rows, audit_fraction=0.0)
    found = []
    for index, (verdict, value) in enumerate(zip(verdicts, scores, strict=True)):
        question = select(verdict, config, 0, 0, index) if rows else None
        by_judge = question is not None and question.decides and value >= threshold
        found.append(verdict.removal is not None or by_judge)
    return found


def ask(judge: Classifier, verdicts: Sequence[Verdict]) -> list[float]:
    """Return the judge's scores of all rows."""
    config = JudgeConfig("judge", rows="all", text=TEXT)
    questions = [select(verdict, config, 0, 0, index) for index, verdict in enumerate(verdicts)]
    return judge.score([question.text for question in questions if question is not None])


def list_decisions(verdicts: Sequence[Verdict], scores: Sequence[float]) -> Iterator[tuple[str, list[bool]]]:
    """Yield for each way to decide its name and which rows go."""
    yield "rules", decide(verdicts, scores, "", 0.0)
    for threshold in THRESHOLDS:
        yield f"judge_at_{threshold}", [value >= threshold for value in scores]
        yield f"doubted_at_{threshold}", decide(verdicts, scores, "doubted", threshold)
        yield f"all_at_{threshold}", decide(verdicts, scores, "all", threshold)


def measure_set(name: str, judges: Sequence[Classifier]) -> list[Result]:
    """Return the scores of each way to decide on a labelled set, as means over the judges."""
    rows = read_labelled(SETS[name])
    rules = make_filter(FilterConfig())
    verdicts = [rules.judge(row.conversation) for row in rows]
    figures: dict[str, list[float]] = {}
    for judge in judges:
        for way, removed in list_decisions(verdicts, ask(judge, verdicts)):
            found = score([_make_judged(row, goes) for row, goes in zip(rows, removed, strict=True)])
            for metric in ("f1", "precision", "recall", "traps_removed"):
                figures.setdefault(f"{metric}_{name}_{way}", []).append(getattr(found, metric))
    results = []
    for metric, values in figures.items():
        results.append(Result(metric, statistics.mean(values), f"mean of {len(values)} seeds"))
        if metric.startswith("f1") and not metric.endswith("rules") and len(values) > 1:
            results.append(Result(f"{metric}_spread", max(values) - min(values), "largest less smallest"))
    return results


def _make_judged(row: Labelled, is_removed: bool) -> Judged:
    question = select(Verdict(row.conversation), JudgeConfig("judge", rows="all"), 0, 0, 0)
    return Judged(row, make_finding(question) if is_removed and question is not None else None)


def measure_ordinary(judges: Sequence[Classifier]) -> list[Result]:
    """Return which share of texts in which nobody refuses anything goes, by each way to decide."""
    texts = {"documentation": list_ordinary()[NUM_ORDINARY:], "roles": list_roles(), "paragraphs": list_paragraphs()}
    rules = make_filter(FilterConfig())
    results = []
    for name, conversations in texts.items():
        if not conversations:
            continue
        verdicts = [rules.judge(conversation) for conversation in conversations]
        shares: dict[str, list[float]] = {}
        for judge in judges:
            for way, removed in list_decisions(verdicts, ask(judge, verdicts)):
                shares.setdefault(way, []).append(sum(removed) / len(removed))
        results += [
            Result(f"ordinary_{name}_{way}", statistics.mean(values), f"of {len(verdicts)} texts, mean")
            for way, values in shares.items()
        ]
    return results


def measure_speed(judge: Classifier) -> list[Result]:
    """Return how many rows one core judges in a second of its time, whatever else the machine does."""
    texts = [f"{row.turns[0].content} [SEP] {row.turns[1].content}" for row in list_ordinary()[:NUM_JUDGED]]
    started = time.process_time()
    judge.score(texts)
    spent = time.process_time() - started
    mean = statistics.mean(map(len, texts))
    return [Result("rows_per_second_of_a_core", len(texts) / spent, f"rows of {mean:.0f} characters")]


def choose(epochs: Sequence[int]) -> list[Result]:
    """Return how judges do on thirds of the development set that they were not trained on, by epochs and threshold."""
    mended, rows = read_labelled(SETS["mended"]), read_labelled(SETS["development"])
    config = JudgeConfig("judge", rows="all", text=TEXT)
    results = []
    for number in epochs:
        scores = {}
        for fold in range(FOLDS):
            others = [row for index, row in enumerate(rows) if index % FOLDS != fold]
            how = JudgeTraining(**{**vars(HOW), "epochs": number, "seed": fold})
            judge = train([*mended, *others], list_ordinary()[:NUM_ORDINARY], how)
            own = {index: row for index, row in enumerate(rows) if index % FOLDS == fold}
            asked = [select(Verdict(row.conversation), config, 0, 0, 0) for row in own.values()]
            values = judge.score([question.text for question in asked if question is not None])
            scores |= dict(zip(own, values, strict=True))
        for threshold in (0.1, 0.3, 0.5, 0.7, 0.9, 0.95):
            found = score([_make_judged(row, scores[index] >= threshold) for index, row in enumerate(rows)])
            results += [
                Result(f"{metric}_epochs_{number}_at_{threshold}", getattr(found, metric), "judge alone")
                for metric in ("f1", "traps_removed")
            ]
    return results


def main() -> int:
    """Train, judge and report."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="judges to train (default: 3)")
    parser.add_argument("--choose", metavar="EPOCHS", type=int, nargs="+", help="choose by the development set only")
    args = parser.parse_args()
    # As many as a small pod has, and the rate below is a core's.
    torch.set_num_threads(1)
    base = {"package": judge_base.PACKAGE, "sha256": judge_base.SHA256, "licence": judge_base.LICENCE}
    facts = {"base": base, "training": vars(HOW), "text": TEXT, "thresholds": THRESHOLDS}
    if args.choose:
        write_results("judge-choice", choose(args.choose), **facts)
        return 0
    rows = [row for name in MENDED_BY for row in read_labelled(SETS[name])]
    judges = [
        train(rows, list_ordinary()[:NUM_ORDINARY], JudgeTraining(**{**vars(HOW), "seed": seed}))
        for seed in range(args.seeds)
    ]
    results = [result for name in SETS if name not in MENDED_BY for result in measure_set(name, judges)]
    results += [*measure_ordinary(judges), *measure_speed(judges[0])]
    write_results("judge", results, seeds=args.seeds, rows=len(rows) + NUM_ORDINARY, **facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
