"""A preparation's report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere.

Pure: made from what report.json and samples.jsonl hold. Texts of the data are hostile until escaped, so every value
goes through `plots.escape`; the page also forbids itself scripts and requests.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from finetune_trainer.data.page_parts import build_document, build_section, build_table, build_tile
from finetune_trainer.data.plots import draw_bars, draw_fates, draw_histograms, escape, format_share, shorten

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TOP = 20
"""Bars of one plot; the table has all."""
_OPEN_RULES = 5
"""Rules whose samples are shown unasked."""
_LONGEST_NAME = 200
"""Characters of a rule's name; in legacy mode it is the phrase."""
_LONGEST_SETTINGS = 20_000

_FATES = (("kept", "Kept", "rowsKept"), ("removed", "Removed", "rowsRemoved"), ("bad", "Unusable", "rowsBad"))
_TILES = (
    ("Rows read", "rowsRead"),
    ("Kept", "rowsKept"),
    ("Removed", "rowsRemoved"),
    ("Edited", "rowsEdited"),
    ("Flagged", "rowsFlagged"),
    ("Unsure", "rowsUnsure"),
    ("Unusable", "rowsBad"),
)
_OUTPUTS = (("Rows to train on", "rowsTrain"), ("Rows held out", "rowsHoldout"), ("Tokens to train on", "tokens"))
_ACTIONS = (("removed", "Rows removed"), ("edited", "Rows that lost a sentence"), ("flagged", "Rows flagged and kept"))
_LENGTHS = (
    ("promptCharacters", "Prompts", "characters"),
    ("answerCharacters", "Answers", "characters"),
    ("promptTokens", "Prompts", "tokens"),
    ("answerTokens", "Answers", "tokens"),
)


def build_page(report: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    """Return the page."""
    sections = [
        _build_summary(report),
        *(_build_findings(report, word, title) for word, title in _ACTIONS),
        _build_lengths(report["lengths"]),
        _build_judge(report.get("judge")),
        _build_rules(report["rules"], samples),
        _build_bad_rows(report),
        _build_sources(report["sources"]),
        _build_settings(report),
    ]
    digest = report["digest"]
    subtitle = f"Data set <code>{escape(digest)}</code>"
    return build_document(f"Data set {digest}", "Data preparation", subtitle, sections)


def _build_summary(report: Mapping[str, Any]) -> str:
    read = report["rowsRead"]
    tiles = "".join(_count_tile(label, report[key], read) for label, key in _TILES)
    outputs = "".join(_count_tile(label, report[key]) for label, key in _OUTPUTS)
    fates = [(kind, label, report[key]) for kind, label, key in _FATES]
    legend = "".join(f'<span><i class="{kind}"></i>{label}</span>' for kind, label, rows in fates if rows)
    bar = draw_fates(fates, "Rows kept, removed and unusable")
    return build_section(
        "Summary",
        f'<div class="fates">{bar}<p class="legend">{legend}</p></div>',
        f'<div class="tiles">{tiles}</div><div class="tiles">{outputs}</div>',
    )


def _count_tile(label: str, number: int | None, total: int = 0) -> str:
    value = "not counted" if number is None else f"{number:,}"
    return build_tile(label, value, format_share(number, total) if number and total > number else "")


def _build_findings(report: Mapping[str, Any], word: str, title: str) -> str:
    if not report.get(f"{word}PerRule"):
        return ""
    plots = []
    for by in ("Category", "Language", "Field", "Rule"):
        numbers: dict[str, int] = report[f"{word}Per{by}"]
        # report.json lists them by name.
        top = dict(sorted(numbers.items(), key=lambda item: (-item[1], item[0]))[:_TOP])
        more = f", the first {_TOP} of {len(numbers):,}" if len(numbers) > _TOP else ""
        caption = f"by {by.lower()}{more}"
        plots.append(
            f"<figure><figcaption>{caption}</figcaption>"
            f"{draw_bars(top, report['rowsRead'], word, f'{title} {caption}')}</figure>"
        )
    # The plot of the rules is the tallest, so the other three share the column beside it.
    columns = f'<div class="plots"><div class="stack">{"".join(plots[:-1])}</div>{plots[-1]}</div>'
    several = "" if word == "removed" else " A row counts once for each rule that found something in it."
    return build_section(title, f'<p class="note">Shares are of all rows read.{several}</p>', columns)


def _build_lengths(lengths: Mapping[str, Any]) -> str:
    plots = []
    for key, title, unit in _LENGTHS:
        if key not in lengths:
            continue
        before, after = lengths[key]["before"], lengths[key]["after"]
        bins = [{one["from"]: one["rows"] for one in histogram["bins"]} for histogram in (before, after)]
        name = f"{title}, {unit} per row"
        plots.append(
            f"<figure><figcaption>{name}</figcaption>{draw_histograms(bins[0], bins[1], unit, name)}"
            f"{_build_length_table(before, after)}</figure>"
        )
    if not plots:
        return ""
    legend = '<p class="legend"><span><i class="before"></i>before</span><span><i class="after"></i>after</span></p>'
    note = '<p class="note">Rows per length, before and after; four bins to each doubling of the length.</p>'
    return build_section("Lengths", note, legend, f'<div class="plots">{"".join(plots)}</div>')


def _build_length_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    names = (("rows", "rows"), ("mean", "mean"), ("p50", "50 % at most"), ("p95", "95 %"), ("p99", "99 %"))
    head = "".join(f'<th class="number">{label}</th>' for _, label in names)
    rows = "".join(
        f"<tr><th>{when}</th>" + "".join(f'<td class="number">{one[key]:,}</td>' for key, _ in names) + "</tr>"
        for when, one in (("before", before), ("after", after))
    )
    return f'<table class="small"><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _build_judge(judge: Mapping[str, Any] | None) -> str:
    if not judge:
        return ""
    names = (("rulesRemove", "rules remove"), ("rulesKeep", "rules keep"), ("rulesUnsure", "rules unsure"))
    rows = "".join(
        f'<tr><th>{label}</th><td class="number">{judge[key]["judgeRemoves"]:,}</td>'
        f'<td class="number">{judge[key]["judgeKeeps"]:,}</td></tr>'
        for key, label in names
    )
    share = judge["agreement"]
    note = "" if share is None else f"<p>Where the rules are sure, the judge agrees on {share:.1%} of the rows.</p>"
    if judge["removedUndoubted"]:
        note += f"<p>It removed {judge['removedUndoubted']:,} rows in which the rules doubted nothing.</p>"
    head = '<thead><tr><th></th><th class="number">judge removes</th><th class="number">judge keeps</th></tr></thead>'
    return build_section("Judge", note, f'<table class="narrow">{head}<tbody>{rows}</tbody></table>')


def _build_rules(rules: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]) -> str:
    if not rules:
        return ""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for sample in samples:
        found.setdefault((sample["action"], sample["rule"]), []).append(sample)
    note = (
        '<p class="note">Each rule with a seeded sample of what it found. '
        "Rows are numbered from 0 in their source, as in removed.jsonl.</p>"
    )
    blocks = []
    for position, rule in enumerate(rules):
        # A rule of several languages has one sample, shown with the first.
        own = found.pop((rule["action"], rule["rule"]), [])
        blocks.append(_build_rule(rule, own, is_open=position < _OPEN_RULES))
    return build_section("Rules", note, *blocks)


def _build_rule(rule: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], *, is_open: bool) -> str:
    about = f"{rule['category']} · {rule['language']} · {rule['action']}"
    name = escape(shorten(rule["rule"], _LONGEST_NAME))
    head = (
        f'<summary><span class="rule">{name}</span><span class="quiet">{escape(about)}</span>'
        f'<b class="number">{rule["rows"]:,}</b></summary>'
    )
    items = "".join(
        f'<li><p class="place">source {one["source"]}, row {one["index"]:,}, {escape(one["field"])}</p>'
        f'<p class="text"><bdi>{escape(one["before"])}<mark>{escape(one["found"])}</mark>{escape(one["after"])}</bdi>'
        "</p></li>"
        for one in samples
    )
    return f"<details{' open' if is_open else ''}>{head}<ul>{items}</ul></details>"


def _build_bad_rows(report: Mapping[str, Any]) -> str:
    rows = report["badRows"]
    if not rows:
        return ""
    note = f'<p class="note">The first {len(rows):,} of {report["rowsBad"]:,}; all are in bad.jsonl.</p>'
    lines = [(row["file"], f"{row['line']:,}", row["why"]) for row in rows]
    return build_section("Unusable rows", note, build_table(("File", "Line", "Why"), lines))


def _build_sources(sources: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for source in sources:
        files = [f"{file['name']}\nsha256 {file['sha256']}" for file in source["files"]]
        numbers = [f"{source[key]:,}" for key in ("rowsRead", "rowsKept", "rowsRemoved", "rowsBad")]
        lines.append(("\n".join(files), source["format"], f"{source['weight']:g}", *numbers))
    names = ("Files", "Format", "Weight", "Read", "Kept", "Removed", "Unusable")
    return build_section("Sources", build_table(names, lines))


def _build_settings(report: Mapping[str, Any]) -> str:
    text = json.dumps(report["settings"], indent=2, ensure_ascii=False, sort_keys=True)
    if len(text) > _LONGEST_SETTINGS:
        text = text[:_LONGEST_SETTINGS] + "\n… the rest is in report.json"
    named = {**report["versions"], "data format": report["version"]}
    versions = " · ".join(f"{escape(name)} {escape(version)}" for name, version in named.items())
    return build_section("Settings and versions", f"<p>{versions}</p><pre>{escape(text)}</pre>")
