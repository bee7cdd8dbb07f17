"""A run's report as one HTML page that needs nothing else. Pure: made from what `facts.build_report` returns.

Answers of models and texts of the data are hostile until escaped, so every value goes through `plots.escape`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from finetune_trainer.checkpoints.disk import format_bytes
from finetune_trainer.data.page_parts import build_document, build_section, build_table, build_tile
from finetune_trainer.data.plots import draw_bars, draw_fates, escape, format_share
from finetune_trainer.report.charts import Curve, draw_curves, format_number
from finetune_trainer.report.page_attempts import build_attempts, format_seconds
from finetune_trainer.report.tables import (
    ABOUT_GATES,
    ABOUT_MODELS,
    ABOUT_SCORES,
    Table,
    tabulate_gates,
    tabulate_scores,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TOP = 12
"""Bars of one plot."""
_STYLE = """
.tiles{grid-template-columns:repeat(auto-fit,minmax(130px,1fr))}
.tiles b{font-size:17px;white-space:nowrap}
.tiles small{display:block;margin:0}
.line{fill:none;stroke:var(--kept);stroke-width:1.7;stroke-linejoin:round}
.line.lost{stroke:var(--removed);stroke-width:1.4}
.line.dot{fill:var(--kept);stroke:none}
.line.lost.dot{fill:var(--removed)}
.dots{fill:var(--edited);background:var(--edited)}
.lost-key{background:var(--removed)}
.verdict{font-weight:600}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:12px}
.sample{border:1px solid var(--line);border-radius:8px;background:var(--panel);padding:12px 14px;margin:10px 0;
break-inside:avoid}
.sample h3{margin:0 0 2px;font-size:12.5px;font-weight:600;color:var(--quiet)}
.sample .prompt{margin-bottom:10px}
.missing{margin:0;padding-left:20px;list-style:disc}
.missing li{border:0;padding:2px 0}
table.facts{width:auto;max-width:100%}
table.facts th{white-space:nowrap;padding-right:28px}
header code{overflow-wrap:anywhere}
.timeline svg{min-width:760px}
.wide table:not(.facts) th{white-space:pre-wrap}
@media screen{.wide table:not(.facts) th,.wide table:not(.facts) td{overflow-wrap:break-word}}
@media screen and (max-width:760px){.wide table:not(.facts) th,.wide table:not(.facts) td{white-space:nowrap}
table.facts th{white-space:normal;padding-right:10px}}
@media print{.wide td.number{white-space:pre-wrap;overflow-wrap:break-word}
.timeline svg{min-width:0}.tiles{grid-template-columns:repeat(4,1fr)}
.text{font-size:10px}.answers{grid-template-columns:repeat(3,1fr)}}
"""
_CURVES = (
    ("loss", "Loss", "nats per answer token", False),
    ("learningRate", "Learning rate", "", True),
    ("tokensPerSecond", "Throughput", "tokens per second", True),
)
_FATES = (("kept", "Kept", "rowsKept"), ("removed", "Removed", "rowsRemoved"), ("bad", "Unusable", "rowsBad"))


def build_page(report: Mapping[str, Any]) -> str:
    """Return the page."""
    name = report["job"].get("name") or "A fine-tuning run"
    digest = report["model"].get("digest")
    subtitle = f"Model <code>{escape(digest)}</code>" if digest else "No model has been promoted yet"
    sections = [
        _build_summary(report),
        _build_scores(report["scores"]),
        _build_gates(report),
        _build_curves(report["curves"]),
        build_attempts(report),
        _build_samples(report["samples"]),
        _build_data(report["data"]),
        _build_lineage(report),
        _build_missing(report["missing"]),
    ]
    return build_document(f"Run report: {name}", f"Run report: {name}", subtitle, sections, _STYLE)


def _build_summary(report: Mapping[str, Any]) -> str:
    summary, work, tiles = report["summary"], report["work"], []
    if "step" in summary:
        total = summary.get("totalSteps")
        tiles.append(build_tile("Steps", f"{summary['step']:,}", f"of {total:,}" if total else ""))
    if "lastLoss" in summary:
        tiles.append(build_tile("Training loss", f"{summary['lastLoss']:.4g}", f"at first {summary['firstLoss']:.4g}"))
    held_out = next((one for one in report["scores"] if (one["task"], one["metric"]) == ("holdout", "loss")), None)
    if held_out is not None:
        aside = f"base {held_out['base']:.4g}" if "base" in held_out else ""
        tiles.append(build_tile("Held-out loss", f"{held_out['tuned']:.4g}", aside))
    if "tokensPerSecond" in summary:
        tiles.append(build_tile("Throughput", format_number(summary["tokensPerSecond"]), "tokens/s"))
    if work:
        tiles += _list_work_tiles(work)
    return build_section("Summary", f'<div class="tiles">{"".join(tiles)}</div>') if tiles else ""


def _list_work_tiles(work: Mapping[str, Any]) -> list[str]:
    lost = f"{work['stepsLost']:,} steps lost" if work["stepsLost"] else "no step lost"
    tiles = [build_tile("Time with training pods", format_seconds(work["allocatedSeconds"]))]
    if "goodput" in work:
        tiles.append(build_tile("Goodput", f"{work['goodput']:.1%}"))
    tiles.append(
        build_tile("GPU-hours", format_number(work["gpuHours"]), f"{work['gpus']} GPUs")
        if work["gpus"]
        else build_tile("Pod-hours", format_number(work["podHours"]), "no GPUs")
    )
    return [*tiles, build_tile("Restarts", f"{work['restarts']:,}", lost)]


def _build_scores(scores: Sequence[Mapping[str, Any]]) -> str:
    if not scores:
        return ""
    about = f"{ABOUT_SCORES} {ABOUT_MODELS}" if any(one["models"] for one in scores) else ABOUT_SCORES
    return build_section("Scores", _build_note(about), _build_table(tabulate_scores(scores)))


def _build_gates(report: Mapping[str, Any]) -> str:
    if not report["gates"]:
        return ""
    note = _build_note(ABOUT_GATES.format(time=report["createdAt"]))
    return build_section("Gates", note, _build_table(tabulate_gates(report["gates"])))


def _build_note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _build_table(table: Table) -> str:
    return build_table(table.names, table.lines, table.numeric)


def _build_samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    note = (
        '<p class="note">Greedy answers to held-out prompts, which no training saw; a seeded choice, cut at a number '
        "of tokens.</p>"
    )
    return build_section("Sample answers", note, *(_build_sample(sample) for sample in samples))


def _build_sample(sample: Mapping[str, Any]) -> str:
    sides = (("Base", "base"), ("Tuned", "tuned"), ("The data's own answer", "reference"))
    answers = "".join(_build_text(title, sample[key]) for title, key in sides if sample.get(key) is not None)
    prompt = f'<div class="prompt">{_build_text("Prompt", sample["prompt"])}</div>'
    return f'<div class="sample">{prompt}<div class="answers">{answers}</div></div>'


def _build_text(title: str, text: str) -> str:
    shown = escape(text) if text.strip() else '<span class="quiet">(empty)</span>'
    return f'<div><h3>{escape(title)}</h3><p class="text"><bdi>{shown}</bdi></p></div>'


def _build_curves(curves: Mapping[str, Any]) -> str:
    plots = []
    for key, title, unit, from_zero in _CURVES:
        if key in curves:
            held_out = curves.get("evalLoss") if key == "loss" else None
            plots.append(_build_curve(curves[key], f"{title}, {unit}" if unit else title, unit, from_zero, held_out))
    if not plots:
        return ""
    legend = []
    if any(curve["lost"] for curve in curves.values()):
        legend.append('<span><i class="kept"></i>kept</span><span><i class="lost-key"></i>lost to a restart</span>')
    if "evalLoss" in curves:
        legend.append('<span><i class="dots"></i>held-out rows, during training</span>')
    key = f'<p class="legend">{"".join(legend)}</p>' if legend else ""
    return build_section("Training", key, f'<div class="plots">{"".join(plots)}</div>')


def _build_curve(
    curve: Mapping[str, Any], caption: str, unit: str, from_zero: bool, held_out: Mapping[str, Any] | None
) -> str:
    drawn = [*(Curve("line lost", stretch) for stretch in curve["lost"]), Curve("line", curve["kept"])]
    drawn += [Curve("dots", held_out["kept"])] if held_out else []
    plot = draw_curves(drawn, caption, unit, from_zero=from_zero)
    return f"<figure><figcaption>{escape(caption)}</figcaption>{plot}</figure>"


def _build_data(data: Mapping[str, Any]) -> str:
    if "rowsRead" not in data:
        return ""
    fates = [(kind, label, data.get(key) or 0) for kind, label, key in _FATES]
    legend = "".join(
        f'<span><i class="{kind}"></i>{label} {rows:,} ({escape(format_share(rows, data["rowsRead"]))})</span>'
        for kind, label, rows in fates
        if rows
    )
    bar = (
        f'<div class="fates">{draw_fates(fates, "Rows kept, removed and unusable")}<p class="legend">{legend}</p></div>'
    )
    named = (("Rows read", "rowsRead"), ("Rows to train on", "rowsTrain"), ("Rows held out", "rowsHoldout"))
    counts = (*named, ("Tokens to train on", "tokens"))
    tiles = "".join(build_tile(label, f"{data[key]:,}") for label, key in counts if data.get(key) is not None)
    plots = []
    for key, title in (("removedPerCategory", "Rows removed by category"), ("removedPerRule", "Rows removed by rule")):
        numbers = dict(sorted((data.get(key) or {}).items(), key=lambda item: (-item[1], item[0]))[:_TOP])
        if numbers:
            plot = draw_bars(numbers, data["rowsRead"], "removed", title)
            plots.append(f"<figure><figcaption>{title}</figcaption>{plot}</figure>")
    page = f'<p class="note">All of it: <code>{escape(data["page"])}</code></p>' if data.get("page") else ""
    figures = f'<div class="plots">{"".join(plots)}</div>' if plots else ""
    return build_section("Data", bar, f'<div class="tiles">{tiles}</div>', f"<br>{figures}" if figures else "", page)


def _build_lineage(report: Mapping[str, Any]) -> str:
    model, base, data = report["model"], report["base"], report["data"]
    checkpoint, training, job, work = report["checkpoint"], report["training"], report["job"], report["work"]
    made = f", of {checkpoint['created_at']}" if checkpoint.get("created_at") else ""
    attempt = f", by attempt {checkpoint['attempt']}" if checkpoint.get("attempt") else ""
    facts = (
        ("Job", "/".join(part for part in (job.get("namespace"), job.get("name")) if part)),
        ("Model digest", model.get("digest")),
        ("Parameters", f"{model['parameters']:,}" if model.get("parameters") else ""),
        ("Size", format_bytes(model["bytes"]) if model.get("bytes") else ""),
        ("Promoted", model.get("createdAt")),
        ("Checkpoint", f"step {checkpoint['step']:,}{attempt}{made}" if "step" in checkpoint else ""),
        ("Base model", base.get("source")),
        ("Base revision", base.get("revision")),
        ("Base digest", base.get("digest")),
        ("Base licence", base.get("license")),
        ("Data digest", data.get("digest")),
        ("Data sources", "\n".join(data.get("sources") or ())),
        ("Prompt", data.get("promptTemplate")),
        ("Recipe", f"{training['recipe']}, {training['method']}" if training else ""),
        ("Restarts", str(work["restarts"]) if work else ""),
        ("Code", ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)),
        *((f"Image, {name}", image) for name, image in sorted(report["images"].items())),
    )
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts if value)
    settings = json.dumps(training, indent=2, ensure_ascii=False, sort_keys=True) if training else ""
    folded = (
        f"<details><summary>Settings of the training</summary><pre>{escape(settings)}</pre></details>"
        if settings
        else ""
    )
    return build_section(
        "Lineage", f'<div class="wide"><table class="facts"><tbody>{rows}</tbody></table></div>', folded
    )


def _build_missing(missing: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in missing)
    return build_section("Not in this report", f'<ul class="missing">{items}</ul>') if items else ""
