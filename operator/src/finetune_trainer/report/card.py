"""The model card of a promoted model, or of its adapter alone: README.md with the front matter that hubs read. Pure.

It holds no text of the data and no answer: those are in the report's page.
"""

from __future__ import annotations

import dataclasses
import html
import math
import re
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from finetune_trainer.adapters.compose import SERVED_RANKS
from finetune_trainer.report.page_attempts import format_seconds
from finetune_trainer.report.tables import (
    ABOUT_GATES,
    ABOUT_MODELS,
    ABOUT_SCORES,
    Table,
    tabulate_gates,
    tabulate_scores,
)
from finetune_trainer.storage.publish import CARD_MARK, PROVENANCE, REPORT_PAGE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TEMPLATES = {"wizardlm", "alpaca", "vicuna"}


@dataclasses.dataclass(frozen=True)
class AdapterFacts:
    """What a card says of an adapter that is published without its base."""

    base: str
    """Name on the hub, or where else the base came from; empty: not known."""
    revision: str
    """Commit of the base on the hub; empty elsewhere."""
    rank: int
    has_tokenizer: bool
    """Whether a tokenizer lies beside it; else it is the base's."""


def build_card(report: Mapping[str, Any], adapter: AdapterFacts | None = None) -> str:
    """Return the text of a promoted model's card; with `adapter` of the one for its adapter alone."""
    data = ModelCardData(
        base_model=name_on_hub(report["base"].get("source")),
        base_model_relation="adapter" if adapter else None,
        datasets=[name for source in report["data"].get("sources") or () if (name := name_on_hub(source))] or None,
        eval_results=_list_results(report["scores"]) or None,
        library_name="peft" if adapter else "transformers",
        license=report["base"].get("license"),
        license_name=report["base"].get("license_name"),
        license_link=report["base"].get("license_link"),
        model_name=_choose_name(report),
        pipeline_tag="text-generation",
        tags=["finetune-operator", "sft", *(["lora"] if report["training"].get("method") == "lora" else [])],
    )
    sections = (
        CARD_MARK,
        f"# {_choose_name(report)}",
        _describe(report, adapter),
        _build_adapter_use(report, adapter) if adapter else _build_use(report),
        _build_training(report),
        _build_data(report["data"]),
        _build_scores(report["scores"]),
        _build_gates(report),
        _build_lineage(report, adapter),
    )
    body = "\n\n".join(section for section in sections if section)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def _choose_name(report: Mapping[str, Any]) -> str:
    return str(report["job"].get("name") or (report["model"].get("digest") or "")[:12] or "model")


def name_on_hub(source: str | None) -> str | None:
    """Return `owner/name` of a source on the hub; None for one elsewhere."""
    found = re.fullmatch(r"hf://(?:datasets/|models/)?([^/@]+/[^/@]+)(?:[/@].*)?", source or "")
    return found.group(1) if found else None


def _list_results(scores: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    """Return the scores of tasks as hubs know them; held-out rows are no data set of a hub, and are in the text."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=one["task"],
            dataset_name=one["task"],
            metric_type=one["metric"].partition(",")[0],
            metric_value=one["tuned"],
        )
        for one in scores
        if one["task"] != "holdout" and math.isfinite(one["tuned"])
    ]


def _describe(report: Mapping[str, Any], adapter: AdapterFacts | None) -> str:
    base = report["base"]
    if not base.get("source"):
        return ""
    revision = f" at revision `{base['revision']}`" if base.get("revision") else ""
    if adapter is None:
        return f"`{base['source']}`{revision}, fine-tuned on instructions."
    return (
        f"A LoRA adapter of rank {adapter.rank} for `{base['source']}`{revision}, trained on instructions. "
        "It holds what was learned and no model: it needs that base model, and no other will do."
    )


def _describe_prompt(report: Mapping[str, Any]) -> str:
    template = report["data"].get("promptTemplate")
    prompt = f"The prompt of training is `{template}`; " if template in _TEMPLATES else ""
    return f"{prompt}the tokenizer's chat template renders it."


def _build_adapter_use(report: Mapping[str, Any], adapter: AdapterFacts) -> str:
    """Return how the adapter is put on its base; one that is on no hub is a folder of the reader's."""
    is_on_hub = name_on_hub(report["base"].get("source")) == adapter.base
    base = adapter.base if is_on_hub else "base-model"
    aside = "" if is_on_hub else f" `base-model` stands for the folder of the base model, `{adapter.base}`."
    at = f', revision="{adapter.revision}"' if adapter.revision else ""
    option = f" --revision {adapter.revision}" if adapter.revision else ""
    tokenizer = '"."' if adapter.has_tokenizer else f'"{base}"{at}'
    return (
        "## Use\n\n"
        f"{_describe_prompt(report)}{aside} With PEFT:\n\n"
        "```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}"{at}, dtype="auto")\n'
        'model = PeftModel.from_pretrained(base, ".")  # this folder, or the repository\'s name\n'
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})\n"
        f"```{_build_vllm_use(adapter, base + option, _choose_name(report))}"
    )


def _build_vllm_use(adapter: AdapterFacts, base: str, name: str) -> str:
    rank = next((each for each in SERVED_RANKS if each >= adapter.rank), None)
    if rank is None:
        return ""
    template = " --chat-template chat_template.jinja" if adapter.has_tokenizer else ""
    return (
        "\n\nWith vLLM, in this folder:\n\n"
        "```sh\n"
        f"vllm serve {base} \\\n"
        f"  --enable-lora --max-lora-rank {rank} --lora-modules {name}=.{template}\n"
        "```"
    )


def _build_use(report: Mapping[str, Any]) -> str:
    return (
        "## Use\n\n"
        f"{_describe_prompt(report)}\n\n"
        "```python\n"
        "from transformers import pipeline\n\n"
        'generate = pipeline("text-generation", model=".")  # this folder, or the repository\'s name\n'
        'print(generate([{"role": "user", "content": "..."}])[0]["generated_text"][-1]["content"])\n'
        "```"
    )


def _build_training(report: Mapping[str, Any]) -> str:
    training, work, summary = report["training"], report["work"], report["summary"]
    facts = []
    if training:
        base = f" on a base in {quantized}" if (quantized := training.get("lora_quantization")) else ""
        facts.append(
            f"recipe `{training['recipe']}`, method `{training['method']}`{base}, precision {training['precision']}"
        )
        facts.append(f"learning rate {training['learning_rate']:g}, {training['scheduler']}, seed {training['seed']}")
    if "step" in summary:
        facts.append(f"{summary['step']:,} optimizer steps")
    if "lastLoss" in summary:
        facts.append(f"training loss {summary['firstLoss']:.4g} at first, {summary['lastLoss']:.4g} at last")
    if work:
        hours = f", {work['gpuHours']:.4g} GPU-hours" if work["gpus"] else ""
        goodput = f", goodput {work['goodput']:.1%}" if "goodput" in work else ""
        facts.append(f"{format_seconds(work['allocatedSeconds'])} with training pods{hours}{goodput}")
        facts.append(f"restarts: {work['restarts']:,}; steps lost to them: {work['stepsLost']:,}")
    return _section("Training", facts)


def _build_data(data: Mapping[str, Any]) -> str:
    facts = [f"source `{source}`" for source in data.get("sources") or ()]
    if "rowsRead" in data:
        removed = ", ".join(f"{name} {rows:,}" for name, rows in sorted((data.get("removedPerCategory") or {}).items()))
        aside = f" ({removed})" if removed else ""
        facts.append(
            f"{data['rowsRead']:,} rows read, {data['rowsKept']:,} kept, {data['rowsRemoved']:,} removed{aside}"
        )
    if data.get("digest"):
        facts.append(f"digest `{data['digest']}`")
    return _section("Data", facts)


def _build_scores(scores: Sequence[Mapping[str, Any]]) -> str:
    if not scores:
        return ""
    about = f"{ABOUT_SCORES} {ABOUT_MODELS}" if any(one["models"] for one in scores) else ABOUT_SCORES
    return f"## Scores\n\n{_escape(about)}\n\n{_build_table(tabulate_scores(scores))}"


def _build_gates(report: Mapping[str, Any]) -> str:
    if not report["gates"]:
        return ""
    about = ABOUT_GATES.format(time=report["createdAt"])
    return f"## Gates\n\n{about}\n\n{_build_table(tabulate_gates(report['gates']))}"


def _build_table(table: Table) -> str:
    marks = ["---:" if index in table.numeric else "---" for index in range(len(table.names))]
    lines = [map(_escape, table.names), marks, *(map(_escape, line) for line in table.lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: str) -> str:
    """Return a text that Markdown shows as it is, on one line of a table."""
    return re.sub(r"([\\|*`\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _build_lineage(report: Mapping[str, Any], adapter: AdapterFacts | None) -> str:
    checkpoint, base = report["checkpoint"], report["base"]
    kind = "digest of the model with the adapter merged into it" if adapter else "model digest"
    facts = [f"{kind} `{report['model'].get('digest', '')}`"] if report["model"] else []
    facts += [f"base model digest `{base['digest']}`"] if base.get("digest") else []
    facts += [f"checkpoint of step {checkpoint['step']:,}"] if "step" in checkpoint else []
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    facts += [versions] if versions else []
    page = "" if adapter else f"; as a page: `{REPORT_PAGE}`"
    facts.append(f"everything, to be read by programs: `{PROVENANCE}`{page}")
    return _section("Lineage", facts)


def _section(title: str, facts: Sequence[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {fact}" for fact in facts) if facts else ""
