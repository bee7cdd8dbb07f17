"""`publish` with `content: Adapter`: the LoRA adapter of a promoted model alone, at every kind of destination."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from finetune_contract.run_config import DatasetConfig, ModelDestination, PromotionConfig, RunConfig, Source
from finetune_contract.workspace import Workspace
from finetune_trainer.promotion import promoted
from finetune_trainer.report.write import write_run_report
from finetune_trainer.storage.publish import CARD_MARK, PROVENANCE

COMMIT = "9f8e7d6c" * 5
HUB_BASE = {"source": "hf://acme/base", "revision": "main", "resolvedRevision": COMMIT, "digest": "ba5e" * 8}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
ALONE = {"adapter_config.json", "adapter_model.safetensors", PROVENANCE, "README.md"}


@pytest.fixture
def make_model(tmp_path):
    """A function that makes a workspace with one promoted model, and returns it."""

    def make(base=HUB_BASE, template="alpaca", rank=16, has_adapter=True):
        workspace = Workspace(tmp_path / "workspace")
        beside = workspace.output / "new"
        beside.mkdir(parents=True)
        save_file({"up": np.ones((4, 4), "f4")}, beside / "model.safetensors")
        for name in (*TOKENIZER, "config.json", "generation_config.json", "model.safetensors.index.json"):
            (beside / name).write_text(json.dumps({"is": name}))
        if has_adapter:
            (beside / "adapter").mkdir()
            save_file({"lora_A": np.ones((rank, 4), "f4")}, beside / "adapter" / "adapter_model.safetensors")
            config = {"peft_type": "LORA", "r": rank, "base_model_name_or_path": "", "revision": None}
            (beside / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        digest = promoted.write_manifest(beside)
        folder = beside.rename(workspace.promoted_model(digest))
        dataset = {"prompt_template": template, "sources": ["hf://acme/rows"]}
        provenance = {"digest": digest, "job": {"name": "polite"}, "base_model": base, "dataset": dataset}
        (folder / PROVENANCE).write_text(json.dumps(provenance))
        assert write_run_report(make_settings(workspace), digest)
        return workspace

    return make


def digest_of(workspace):
    return next(workspace.output.iterdir()).name


def make_settings(workspace, *destinations):
    listed = tuple(ModelDestination(url, content=content) for url, content in destinations)
    promotion = PromotionConfig(destinations=listed, digest=digest_of(workspace))
    return RunConfig(Source("hf://acme/base"), DatasetConfig(()), workspace=str(workspace.root), promotion=promotion)


def read_folder(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def publish(run_command, make_model):
    """A function that publishes the adapter of a new model to the volume, and returns the files of the copy."""

    def run(**model):
        workspace = make_model(**model)
        outcome = run_command("publish", settings=make_settings(workspace, ("pvc://exports", "Adapter")))
        assert outcome.code == 0, outcome.text
        return read_folder(workspace.root / outcome.details["destinations"][0].removeprefix("pvc://"))

    return run


def test_every_kind_of_destination_gets_the_adapter_alone_under_the_digest_of_its_content(
    run_command, make_model, hub, s3, bucket
):
    workspace = make_model()
    urls = [f"s3://{bucket}/adapters", "pvc://exports", "hf://acme/polite"]
    settings = make_settings(workspace, *((url, "Adapter") for url in urls))
    before = read_folder(workspace.output)
    found = run_command("publish", settings=settings).details["destinations"]
    (digest,) = {url.rpartition("/")[2] for url in found}
    assert found == [f"{url}/{digest}" for url in urls]
    assert digest != digest_of(workspace)
    repository = hub.repositories["models/acme/polite"]
    assert repository.tags == {digest: repository.commits[0][0]}
    copies = [
        read_folder(s3.folder / bucket / "adapters" / digest),
        read_folder(workspace.root / "exports" / digest),
        dict(repository.commits[0][1]),
    ]
    for files in copies:
        mark = json.loads(files.pop("COMPLETE"))
        assert mark["digest"] == digest
        assert {entry["name"] for entry in mark["files"]} == set(files) - {PROVENANCE, "README.md"}
        assert set(files) == ALONE | TOKENIZER
        assert files == copies[0]
    assert read_folder(workspace.output) == before


def test_the_model_and_its_adapter_may_go_below_one_prefix(run_command, make_model, s3, bucket):
    workspace = make_model()
    url = f"s3://{bucket}/models"
    outcome = run_command("publish", settings=make_settings(workspace, (url, "Model"), (url, "Adapter")))
    model, adapter = (each.removeprefix(f"{url}/") for each in outcome.details["destinations"])
    assert model == digest_of(workspace)
    assert (s3.folder / bucket / "models" / model / "model.safetensors").is_file()
    assert not list((s3.folder / bucket / "models" / adapter).glob("model*"))


def test_a_second_run_sends_nothing_anew(run_command, make_model, hub):
    settings = make_settings(make_model(), ("hf://acme/polite", "Adapter"))
    first, second = (run_command("publish", settings=settings).details for _ in range(2))
    assert first == second
    assert len(hub.repositories["models/acme/polite"].commits) == 1


def test_its_configuration_names_the_base_on_the_hub_at_its_commit(publish):
    config = json.loads(publish()["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/base", COMMIT)
    assert config["r"] == 16


def test_its_configuration_names_a_base_elsewhere_by_where_it_came_from(publish):
    base = {"source": "s3://models/base", "revision": "", "resolvedRevision": "listing", "digest": "ba5e" * 8}
    config = json.loads(publish(base=base)["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("s3://models/base", None)


def test_a_tokenizer_that_is_the_bases_own_stays_away(publish):
    files = publish(template="tokenizer")
    assert set(files) == {*ALONE, "COMPLETE"}
    assert 'from_pretrained("acme/base", revision=' in files["README.md"].decode()
    assert "chat-template" not in files["README.md"].decode()


def test_its_card_says_that_it_needs_the_base_and_how_it_is_loaded(publish):
    card = publish()["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("acme/base", "adapter")
    assert front["library_name"] == "peft"
    assert CARD_MARK in card
    assert "it needs that base model" in card
    assert f'AutoModelForCausalLM.from_pretrained("acme/base", revision="{COMMIT}"' in card
    assert f"vllm serve acme/base --revision {COMMIT}" in card
    assert "--lora-modules polite=. --chat-template chat_template.jinja" in card
    assert "report.html" not in card


@pytest.mark.parametrize(("rank", "served"), [(6, ["8"]), (16, ["16"]), (40, ["64"]), (1024, [])])
def test_its_card_names_the_smallest_rank_that_vllm_takes(publish, rank, served):
    assert re.findall(r"--max-lora-rank (\d+)", publish(rank=rank)["README.md"].decode()) == served


def test_its_card_says_where_a_base_is_that_is_on_no_hub(publish):
    base = {"source": "s3://models/base", "revision": "", "digest": "ba5e" * 8}
    card = publish(base=base)["README.md"].decode()
    assert "`base-model` stands for the folder of the base model, `s3://models/base`" in card
    assert "vllm serve base-model" in card
    assert "base_model:" not in card


def test_a_model_that_was_trained_whole_has_none_and_nothing_is_sent(run_command, make_model):
    workspace = make_model(has_adapter=False)
    destinations = (("pvc://models", "Model"), ("pvc://exports", "Adapter"))
    outcome = run_command("publish", settings=make_settings(workspace, *destinations))
    assert (outcome.code, outcome.report["reason"]) == (78, "InvalidConfig")
    assert "spec.promotion.destinations[1].content: Adapter" in outcome.text
    assert "content: Model" in outcome.text
    assert not (workspace.root / "models").exists()


@pytest.mark.parametrize(("there", "content"), [("config.json", "Adapter"), ("adapter_config.json", "Model")])
def test_model_and_adapter_are_never_mixed_in_one_repository(run_command, make_model, hub, there, content):
    hub.add("models", "acme/tuned", {there: b"{}"})
    outcome = run_command("publish", settings=make_settings(make_model(), ("hf://acme/tuned", content)))
    assert (outcome.code, outcome.report["reason"]) == (78, "InvalidConfig")
    assert "Write a repository of its own" in outcome.text
    assert len(hub.repositories["models/acme/tuned"].commits) == 1


def test_it_is_published_without_a_cluster_too(run_command, make_model, tmp_path):
    workspace = make_model()
    folder = workspace.promoted_model(digest_of(workspace))
    words = ("--model", str(folder), "--destination", str(tmp_path / "out"), "--content", "Adapter")
    assert run_command("publish", *words).code == 0
    (copy,) = (tmp_path / "out").iterdir()
    assert set(read_folder(copy)) == {*ALONE, *TOKENIZER, "COMPLETE"}
