"""Which files make a model, and what their headers give away."""

from __future__ import annotations

import json

import pytest

from finetune_trainer.errors import TrainerError
from finetune_trainer.model_files import choose_model_files, read_model_facts
from finetune_trainer.storage import Access, RemoteFile
from tests.support.model_bytes import build_model, build_safetensors

ACCESS = Access("spec.model", "model")


def as_files(contents: dict[str, bytes]) -> list[RemoteFile]:
    return [RemoteFile(name, len(content)) for name, content in contents.items()]


def read_facts(contents: dict[str, bytes], **options):
    chosen = choose_model_files(as_files(contents), ACCESS, **options)
    return read_model_facts(chosen, lambda file, start, length: contents[file.name][start : start + length], ACCESS)


def test_safetensors_are_taken_and_pickles_left():
    chosen = [file.name for file in choose_model_files(as_files(build_model()), ACCESS)]
    assert chosen == ["README.md", "config.json", "model.safetensors", "tokenizer_config.json"]


def test_pickled_weights_are_taken_only_when_there_is_nothing_else():
    contents = {"config.json": b'{"model_type": "gpt_neox", "torch_dtype": "float16"}', "pytorch_model.bin": b"x" * 800}
    facts = read_facts(contents)
    assert facts.is_pickled
    assert facts.num_parameters == 400


def test_other_pickles_and_code_are_never_taken():
    extra = {"optimizer.pt": b"x", "training_args.bin": b"x", "modeling_evil.py": b"x", "sub/model.safetensors": b"x"}
    files = as_files(build_model() | extra)
    assert not {file.name for file in choose_model_files(files, ACCESS)} & set(extra)
    trusted = {file.name for file in choose_model_files(files, ACCESS, trust_remote_code=True)}
    assert "modeling_evil.py" in trusted


def test_parameters_are_counted_from_the_headers():
    facts = read_facts(build_model())
    assert (facts.model_type, facts.num_parameters, facts.is_pickled) == ("llama", 4096 + 64, False)


def test_shards_are_counted_together():
    contents = {
        "config.json": b'{"model_type": "llama"}',
        "model-00001-of-00002.safetensors": build_safetensors({"a": (10, 10)}),
        "model-00002-of-00002.safetensors": build_safetensors({"b": (5,)}),
        "model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        ).encode(),
    }
    assert read_facts(contents).num_parameters == 105
    del contents["model-00002-of-00002.safetensors"]
    with pytest.raises(TrainerError, match=r"model-00002-of-00002.safetensors, which .* names, is missing"):
        read_facts(contents)


WHOLE = build_model()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config.json": None}, "holds no config.json"),
        ({"config.json": None, "adapter_config.json": b"{}"}, "LoRA adapter"),
        ({"config.json": b"{"}, "config.json is not JSON"),
        ({"config.json": b"[]"}, "config.json is not a JSON object"),
        ({"config.json": b"{}"}, "names no model_type"),
        ({"model.safetensors": None, "pytorch_model.bin": None}, "holds no weights"),
        ({"model.safetensors": WHOLE["model.safetensors"][:-4]}, "its header says"),
        ({"model.safetensors": WHOLE["model.safetensors"][:40]}, "cut off"),
        ({"model.safetensors": b"version https://git-lfs.github.com/spec/v1"}, "no safetensors file"),
        ({"model.safetensors": b""}, "no safetensors file"),
        ({"model.safetensors": b"\x02\0\0\0\0\0\0\0[]"}, "header of model.safetensors is damaged"),
    ],
)
def test_what_is_no_whole_model_is_refused_with_its_fault(change, said):
    contents = {name: content for name, content in (WHOLE | change).items() if content is not None}
    with pytest.raises(TrainerError, match=said) as caught:
        read_facts(contents)
    assert (caught.value.reason, caught.value.exit_code) == ("ModelInvalid", 65)
    assert "spec.model.source" in caught.value.message + caught.value.hint
