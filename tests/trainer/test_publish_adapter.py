"""The adapter of a LoRA job, published alone to a real S3 server: what it says, and that it works on its base only."""

import json
import os
import pathlib
import re
import shutil

import pytest
import torch
from peft import PeftModel

from finetune_contract.reports import ExitCode
from finetune_contract.run_config import DatasetConfig, ModelDestination, PromotionConfig, RunConfig, Source
from finetune_trainer.__main__ import main
from finetune_trainer.adapters.base import read_model_base
from finetune_trainer.adapters.sources import fetch_adapter
from finetune_trainer.fetch import BaseModel
from finetune_trainer.storage import Access
from finetune_trainer.training import modeling
from tests.support import tiny_models
from tests.support.s3_server import running_s3
from tests.support.training_runs import SMALL, Run, build_texts

LORA = (*SMALL, "training.method=lora", "training.max_steps=4", "checkpoint.every_steps=4", "training.lora_rank=4")
ASK = ("--prompt", "What is 1 + 1?", "--prompt-template", "wizardlm", "--max-new-tokens", "4")


@pytest.fixture(scope="module")
def run(tmp_path_factory, models, data):
    """A LoRA run of a base from S3, promoted, with its adapter published to S3; not to be changed."""
    root = tmp_path_factory.mktemp("published")
    with running_s3(root / "buckets") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.variables.items():
            patch.setenv(name, value)
        shutil.copytree(models["llama"], server.folder / "bucket" / "base")
        made = Run(root / "workspace", models["llama"], data, LORA)
        made.root.mkdir()
        settings = RunConfig(Source("s3://bucket/base"), DatasetConfig(()), workspace=str(made.root))
        BaseModel(settings, made.workspace).download_rest(lambda _: None)
        made.train()
        assert made.call("promote") == 0
        destinations = (ModelDestination("s3://bucket/adapters", content="Adapter"),)
        promotion = PromotionConfig(destinations=destinations, digest=made.report("promote")["details"]["digest"])
        config = root / "run.json"
        config.write_text(
            RunConfig(settings.model, settings.dataset, workspace=settings.workspace, promotion=promotion).to_json()
        )
        assert main(["publish", "--run-config", str(config)]) == 0, made.report("publish")
        yield made


@pytest.fixture(scope="module")
def promoted(run):
    return pathlib.Path(run.report("promote")["details"]["path"])


@pytest.fixture(scope="module")
def published(run, tmp_path_factory):
    """The adapter as another job fetches it from where the report says that it is."""
    (url,) = run.report("publish")["details"]["destinations"]
    return fetch_adapter(url, "", Access("adapter", "model"), tmp_path_factory.mktemp("fetched"))


@pytest.fixture
def stranger(tmp_path):
    """Another model of the very same shape."""
    return tiny_models.build_tiny_llama(tmp_path / "other", build_texts(), vocab_size=400, hidden=64, layers=2, seed=9)


def predict(model):
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(3, 60)[None]).logits.float()


def test_it_is_that_of_the_promoted_model_and_names_the_base(run, promoted, published, capsys):
    assert main(["adapters", "inspect", "--json", str(published), str(promoted)]) == 0
    alone, own = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert alone["digest"] == own["digest"]
    assert alone["base"] == read_model_base(run.workspace.base_model).digests[0]
    assert json.loads((published / "adapter_config.json").read_text())["base_model_name_or_path"] == "s3://bucket/base"


def test_it_answers_over_its_base_and_is_refused_over_another(models, published, stranger, capsys):
    # The original: nothing tells of it there, so that it is known by its weights.
    words = ("generate", "--adapter", str(published), *ASK)
    assert main([*words, "--model", str(models["llama"])]) == 0
    assert main([*words, "--model", str(stranger)]) == ExitCode.NO_INPUT
    assert f"--adapter {published}: its base is" in capsys.readouterr().err


def test_it_is_composed_over_its_base_and_refused_over_another(run, published, stranger, tmp_path, capsys):
    words = ("adapters", "compose", "--adapter", str(published), "--adapter", f"{published}=0.5")
    assert main([*words, "--model", str(run.workspace.base_model), "--out", str(tmp_path / "composed")]) == 0
    assert main([*words, "--model", str(stranger), "--out", str(tmp_path / "refused")]) == ExitCode.NO_INPUT
    assert "its base is" in capsys.readouterr().err


def test_its_card_tells_how_it_is_loaded(run, promoted, tmp_path, monkeypatch):
    folder = shutil.copytree(run.root.parent / "buckets" / "bucket" / "adapters" / find_digest(run), tmp_path / "copy")
    os.symlink(run.workspace.base_model, folder / "base-model")
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL).group(1)
    monkeypatch.chdir(folder)
    names = {}
    exec(code, names)
    base = modeling.load_model(run.workspace.base_model, "auto")
    assert torch.equal(predict(names["model"]), predict(PeftModel.from_pretrained(base, promoted / "adapter")))
    question = [{"role": "user", "content": "What is 1 + 1?"}]
    own = modeling.load_tokenizer(promoted).apply_chat_template(question, tokenize=False)
    assert names["tokenizer"].apply_chat_template(question, tokenize=False) == own


def find_digest(run):
    return run.report("publish")["details"]["destinations"][0].rpartition("/")[2]
