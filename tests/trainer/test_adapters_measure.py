"""A composition beside its base and its parts: losses, drift and scores are those of the models one by one."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from finetune_contract.reports import ExitCode
from finetune_trainer.__main__ import main
from finetune_trainer.training import modeling, tokens

TASK = """
task: joins
dataset_path: json
dataset_kwargs: {data_files: rows.jsonl}
test_split: train
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def model(models):
    return models["llama"]


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate((("polite", 4), ("brief", 6))):
        loaded = modeling.load_model(model, "float32")
        tuned = get_peft_model(
            loaded, LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
        )
        torch.manual_seed(seed)
        for key, parameter in tuned.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.15)
        tuned.save_pretrained(root / name)
    return {name: root / name for name in ("polite", "brief")}


def run_measure(model, data, out, *words):
    fixed = ("--model", str(model), "--data", str(data), "--prompt-template", "wizardlm", "--out", str(out), "--json")
    assert main(["adapters", "measure", *fixed, *words]) == 0
    return json.loads((out / "measurement.json").read_text())


def predict(model, adapter, data):
    """Log-probabilities at every answer token, row by row, of a model that is loaded for this alone."""
    tokenizer = modeling.load_tokenizer(model)
    rows = tokens.tokenize(tokens.read_conversations(data / "holdout.jsonl"), "wizardlm", tokenizer, 2048).rows
    loaded = modeling.load_model(model, "bfloat16")
    loaded = (PeftModel.from_pretrained(loaded, str(adapter)) if adapter else loaded).eval()
    found = []
    for row in rows:
        labels = torch.tensor(row.labels)[1:]
        with torch.inference_mode():
            logits = loaded(input_ids=torch.tensor([list(row.input_ids)])).logits[0, :-1].float()
        found.append((torch.log_softmax(logits, -1)[labels != -100].double(), labels[labels != -100]))
    return found


def test_losses_and_drift_are_those_of_the_models_one_by_one(model, adapters, data, tmp_path):
    words = [word for name in adapters for word in ("--adapter", str(adapters[name]))]
    facts = run_measure(model, data, tmp_path / "out", *words)

    whole = predict(model, tmp_path / "out", data)
    num_tokens = sum(len(labels) for _, labels in whole)
    for side, adapter in (("base", None), *adapters.items()):
        alone = predict(model, adapter, data)
        loss = -sum(logs.gather(1, labels[:, None]).sum() for logs, labels in alone).item() / num_tokens
        assert facts["scores"][side]["holdout"]["loss"] == pytest.approx(loss, rel=5e-3)
        pairs = list(zip(alone, whole, strict=True))
        divergence = sum((mine.exp() * (mine - other)).sum() for (mine, _), (other, _) in pairs).item() / num_tokens
        same = sum((mine.argmax(1) == other.argmax(1)).sum() for (mine, _), (other, _) in pairs).item() / num_tokens
        drift = facts["drift"][side]
        assert divergence > 0.01
        assert drift["divergence"]["value"] == pytest.approx(divergence, rel=5e-2)
        assert drift["agreement"]["value"] == pytest.approx(same, abs=0.03)
        difference, perplexity = facts["differences"][side]
        assert (perplexity["metric"], perplexity["isLargerThanError"]) == ("perplexity", None)
        assert difference["difference"] == pytest.approx(
            facts["scores"]["composition"]["holdout"]["loss"] - loss, abs=5e-3
        )
        assert difference["error"] == drift["loss"]["error"]
        assert difference["isLargerThanError"] is (abs(difference["difference"]) > 1.96 * difference["error"])
    assert facts["rows"] == len(whole)


def test_a_part_alone_has_no_drift_and_its_opposite_brings_the_base_back(model, adapters, data, tmp_path):
    one = run_measure(model, data, tmp_path / "one", "--adapter", f"{adapters['polite']}=0.5")
    assert one["drift"]["polite"]["divergence"]["value"] == pytest.approx(0, abs=1e-6)
    assert one["drift"]["polite"]["agreement"]["value"] == 1
    assert one["drift"]["base"]["divergence"]["value"] > 0.01

    copy = shutil.copytree(adapters["polite"], tmp_path / "again")
    words = ("--adapter", str(adapters["polite"]), "--adapter", f"{copy}=-1")
    none = run_measure(model, data, tmp_path / "none", *words)
    assert none["drift"]["base"]["divergence"]["value"] == pytest.approx(0, abs=1e-3)
    assert none["drift"]["again"]["divergence"]["value"] > 0.01
    assert none["differences"]["base"][0]["isLargerThanError"] is False


def test_every_side_is_scored_on_tasks(model, adapters, data, tmp_path, capsys):
    rows = [{"question": f"What joins {n}?", "choices": ["It joins", "no"], "answer": n % 2} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "joins.yaml").write_text(TASK)
    facts = run_measure(
        model, data, tmp_path / "out", "--adapter", str(adapters["brief"]), "--task", str(tmp_path / "joins.yaml")
    )
    assert set(facts["scores"]) == {"base", "brief", "composition"}
    assert facts["scores"]["brief"]["joins"] == facts["scores"]["composition"]["joins"]

    again = ("--profile", str(tmp_path / "out" / "composition.json"), "--model", str(model))
    assert main(["adapters", "measure", *again, "--data", str(data), "--prompt-template", "wizardlm"]) == 0
    table = capsys.readouterr().out
    assert "|  | base | brief | composition |" in table
    assert "drift of the composition" in table


def test_every_side_is_asked_what_it_refuses(model, adapters, data, tmp_path):
    facts = run_measure(
        model, data, tmp_path / "out", "--adapter", str(adapters["brief"]), "--refusals", "--limit", "2"
    )
    for side in ("base", "brief", "composition"):
        assert set(facts["scores"][side]["refusals"]) == {
            *("refusal_rate", "hedging_rate", "over_refusal_rate", "over_hedging_rate")
        }
    assert facts["scores"]["brief"]["refusals"] == facts["scores"]["composition"]["refusals"]


def test_nothing_to_measure_on_is_refused(model, adapters, capsys):
    words = ("--adapter", str(adapters["brief"]), "--model", str(model))
    assert main(["adapters", "measure", *words]) == ExitCode.USAGE
    assert "Add --data DIR with held-out rows, --task NAME, --refusals" in capsys.readouterr().err
