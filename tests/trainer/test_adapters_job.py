"""What a job's pod composes: its adapters over the model that it promoted, checked, measured, and found again."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from finetune_contract.reports import ExitCode
from finetune_contract.run_config import CompositionConfig, DatasetConfig, RunConfig, Source
from finetune_trainer.adapters.base import read_model_base
from finetune_trainer.adapters.job import find_served
from finetune_trainer.checkpoints.manifest import MANIFEST, list_files, read_manifest, seal_files, write_manifest
from finetune_trainer.errors import TrainerError
from finetune_trainer.serving.generate import Generator
from finetune_trainer.training import modeling

TARGETS = ["q_proj", "v_proj", "down_proj"]
STEPS = ("training.max_steps=4", "checkpoint.every_steps=4")


def write_adapter(model, folder, *, seed=0, rank=4, base="", std=0.1):
    tuned = get_peft_model(
        modeling.load_model(model, "float32"), LoraConfig(r=rank, lora_alpha=8, target_modules=TARGETS)
    )
    torch.manual_seed(seed)
    for key, parameter in tuned.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=std)
    tuned.save_pretrained(folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base or str(model)}))
    return folder


def promote(run, *settings):
    run.train(*STEPS, *settings)
    assert run.call("promote", *STEPS, *settings) == 0
    return pathlib.Path(run.report("promote")["details"]["path"])


def name_adapters(*adapters):
    return "composition.adapters=" + json.dumps([{"source": str(folder), **rest} for folder, rest in adapters])


def predict(model):
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(3, 60)[None]).logits.float()


@pytest.fixture
def full(make_run):
    run = make_run("llama", "full")
    return run, promote(run)


def test_adapters_go_over_the_model_that_was_promoted(full, tmp_path):
    run, model = full
    polite, brief = (write_adapter(model, tmp_path / name, seed=seed) for seed, name in enumerate(("polite", "brief")))
    setting = name_adapters((polite, {"name": "polite"}), (brief, {"name": "brief", "weight": -0.5}))
    assert run.call("compose", setting) == 0, run.report("compose")

    details = run.report("compose")["details"]
    folder = run.workspace.composed_adapter(details["digest"])
    assert details["model"] == f"output/{model.name}"
    assert [each["name"] for each in details["adapters"]] == ["polite", "brief"]
    profile = json.loads((folder / "composition.json").read_text())
    assert profile["base"] == model.name
    measurement = json.loads((folder / "measurement.json").read_text())
    assert measurement["profileDigest"] == details["digest"]
    assert details["scores"]["holdout"]["loss"] == pytest.approx(
        measurement["scores"]["composition"]["holdout"]["loss"], rel=1e-5
    )
    assert set(details["drift"]) == {"base", "polite", "brief"}
    # The same adapters again are the same composition.
    assert run.call("compose", setting) == 0
    assert run.report("compose")["details"]["digest"] == details["digest"]


def ask(generator):
    return generator.answer([{"role": "user", "content": "What does list.opens do?"}], 24).text


def test_what_is_served_answers_with_the_adapters_and_without_at_the_same_time(full, tmp_path):
    run, model = full
    polite = write_adapter(model, tmp_path / "polite", std=0.4)
    assert run.call("compose", name_adapters((polite, {"name": "polite"}))) == 0
    digest = run.report("compose")["details"]["digest"]
    settings = RunConfig(
        Source(str(run.model)), DatasetConfig(()), workspace=str(run.root), composition=CompositionConfig(digest=digest)
    )
    folder, adapter = find_served(settings)
    base = Generator(folder, promoted=model)
    composed = base.share_with_adapter(adapter)

    merged = Generator(model, adapter)
    assert ask(base) == ask(Generator(model)) != ask(composed)
    assert ask(composed)[:20] == ask(merged)[:20]
    weights = {name: weight.data_ptr() for name, weight in base.model.named_parameters()}
    shared = {weight.data_ptr() for weight in composed.model.parameters()}
    assert set(weights.values()) <= shared
    (adapter / "adapter_model.safetensors").write_bytes((polite / "adapter_model.safetensors").read_bytes())
    with pytest.raises(TrainerError, match=r"composition\.json names|rank"):
        find_served(settings)


def test_the_server_answers_for_the_version_and_for_the_model_alone(full, tmp_path):
    from fastapi.testclient import TestClient

    from finetune_trainer.serving.server import build_app

    _, model = full
    base = Generator(model, promoted=model)
    composed = base.share_with_adapter(write_adapter(model, tmp_path / "polite", std=0.4))
    expected = {"tiny": ask(composed), "tiny-base": ask(base)}
    with TestClient(build_app({"tiny": composed, "tiny-base": base}, "abc.def")) as client:
        assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["tiny", "tiny-base"]
        question = {"messages": [{"role": "user", "content": "What does list.opens do?"}], "max_tokens": 24}
        for name, text in expected.items():
            answer = client.post("/v1/chat/completions", json={"model": name, **question})
            assert answer.json()["choices"][0]["message"]["content"] == text
            assert answer.headers["x-model-digest"] == "abc.def"
        refused = client.post("/v1/chat/completions", json={"model": "polite", **question})
        assert refused.status_code == 400
        assert "use one of tiny, tiny-base" in refused.text
        assert client.get("/health").status_code == 200
    assert expected["tiny"] != expected["tiny-base"]


def test_an_adapter_of_another_base_is_refused_by_its_entry(full, models, tmp_path):
    run, model = full
    original = write_adapter(models["llama"], tmp_path / "original", base=f"/models/{'1' * 64}")
    fitting = write_adapter(model, tmp_path / "fitting")
    words = name_adapters((fitting, {"name": "fitting"}), (original, {"name": "polite"}))
    assert run.call("compose", words) == ExitCode.NO_INPUT
    report = run.report("compose")
    assert report["reason"] == "ModelInvalid"
    assert report["message"].startswith(
        f"spec.inference.adapters[1] (polite): its base is {'1' * 64}, not {model.name}"
    )
    assert list(run.workspace.adapters.glob("[!.]*")) == []


def test_a_lora_job_s_own_adapter_is_the_first_part_over_its_base(make_run, models, tmp_path):
    lora = ("training.method=lora", "training.lora_rank=4", "training.zero_stage=2")
    run = make_run("llama", "lora")
    model = promote(run, *lora)
    polite = write_adapter(models["llama"], tmp_path / "polite")
    assert run.call("compose", *lora, name_adapters((polite, {"name": "polite", "weight": 0.5}))) == 0

    details = run.report("compose")["details"]
    assert [each["name"] for each in details["adapters"]] == ["own", "polite"]
    assert (run.root / details["model"]).resolve() == models["llama"].resolve()
    composed = PeftModel.from_pretrained(
        modeling.load_model(models["llama"], "float32"), str(run.workspace.composed_adapter(details["digest"]))
    )
    alone = PeftModel.from_pretrained(modeling.load_model(models["llama"], "float32"), str(model / "adapter"))
    alone.load_adapter(str(polite), adapter_name="polite")
    alone.base_model.set_adapter(["default", "polite"])
    for module in alone.modules():
        if isinstance(module, LoraLayer) and "polite" in module.scaling:
            module.scaling["polite"] *= 0.5
    assert torch.allclose(predict(composed), predict(alone), atol=1e-4)
    assert not torch.allclose(predict(composed), predict(modeling.load_model(models["llama"], "float32")), atol=1e-2)


def test_adapters_of_a_lora_job_s_promoted_model_go_over_that(make_run, tmp_path):
    lora = ("training.method=lora", "training.lora_rank=4", "training.zero_stage=2")
    run = make_run("llama", "merged")
    model = promote(run, *lora)
    polite = write_adapter(model, tmp_path / "polite")
    assert run.call("compose", *lora, name_adapters((polite, {"name": "polite"}))) == 0
    assert run.report("compose")["details"]["model"] == f"output/{model.name}"
    assert model.name in read_model_base(model).digests


def test_a_composition_is_asked_what_it_refuses_where_the_job_asks_its_model(full, tmp_path):
    run, model = full
    polite = write_adapter(model, tmp_path / "polite")
    asked = ("evaluation.refusals=true", "evaluation.limit=2", "evaluation.holdout=false")
    assert run.call("compose", name_adapters((polite, {"name": "polite"})), *asked) == 0
    assert set(run.report("compose")["details"]["scores"]) == {"refusals"}


def test_nothing_to_measure_on_is_refused(full, tmp_path):
    run, model = full
    polite = write_adapter(model, tmp_path / "polite")
    words = (name_adapters((polite, {"name": "polite"})), "evaluation.holdout=false")
    assert run.call("compose", *words) == ExitCode.CONFIG
    assert "nothing to measure the composition on" in run.report("compose")["message"]


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda tensor: tensor[:0], "is empty"), (torch.zeros_like, "the adapter changes nothing")],
)
def test_an_adapter_saved_empty_is_never_promoted(make_run, change, said):
    """As partitioned weights are saved by those who do not gather them."""
    lora = ("training.method=lora", "training.lora_rank=4", "training.zero_stage=2")
    run = make_run("llama", "lora", *lora)
    run.train(*STEPS)
    folder = run.workspace.checkpoints / "checkpoint-4"
    manifest = read_manifest(folder)
    path = folder / "adapter_model.safetensors"
    save_file({name: change(tensor).contiguous() for name, tensor in load_file(path).items()}, path)
    (folder / MANIFEST).unlink()
    write_manifest(folder, dataclasses.replace(manifest, files=seal_files(folder, list_files(folder))))

    assert run.call("promote") == ExitCode.INTERNAL
    assert said in run.report("promote")["message"]
    assert list(run.workspace.output.iterdir()) == []


def test_adapters_in_object_storage_can_be_fetched_in_a_pod():
    """In a process of its own: what a pod has kept from being imported stays so."""
    code = (
        "from finetune_trainer.commands import compose, plain\n"
        "compose.open_storage(['s3://adapters/polite', 'hf://org/brief'])\n"
        "plain.prepare_libraries()\n"
        "import boto3, huggingface_hub\n"
        "assert not huggingface_hub.constants.HF_HUB_OFFLINE\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
