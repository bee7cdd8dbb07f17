"""Adapters composed into one: the same outputs as stacking them live, a rank that is served, errors that are true."""

import json
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_contract.reports import ExitCode
from finetune_trainer.__main__ import main
from finetune_trainer.adapters.compose import Part, Settings, compose, fit_rank
from finetune_trainer.adapters.folder import read_adapter
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage.transfer import hash_file

TOKENS = torch.arange(2, 42)[None]
WEIGHTS = {"polite": 1.0, "brief": -0.7, "safe": 0.35}


def build_base():
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    shapes = {
        "polite": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        "brief": LoraConfig(r=6, lora_alpha=4, target_modules=["q_proj", "down_proj"], use_rslora=True),
        "safe": LoraConfig(r=4, lora_alpha=16, target_modules=["v_proj"], rank_pattern={"0.self_attn.v_proj": 2}),
    }
    for seed, (name, config) in enumerate(shapes.items()):
        model = get_peft_model(build_base(), config)
        torch.manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(root / name)
        name_base(root / name, "tiny")
    return {name: root / name for name in shapes}


def name_base(folder, base):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


def answer(model):
    with torch.inference_mode():
        return model(TOKENS).logits.double()


@pytest.fixture(scope="module")
def stacked(folders):
    """What the base answers with all adapters on it at once, each scaled by its weight."""
    model = None
    for name, folder in folders.items():
        if model is None:
            model = PeftModel.from_pretrained(build_base(), folder, adapter_name=name)
        else:
            model.load_adapter(folder, adapter_name=name)
    model.base_model.set_adapter(list(folders))
    for module in model.modules():
        for name, weight in WEIGHTS.items():
            if isinstance(module, LoraLayer) and name in module.scaling:
                module.scaling[name] *= weight
    return answer(model)


def run_compose(folders, out, *words, names=tuple(WEIGHTS)):
    parts = [word for name in names for word in ("--adapter", f"{folders[name]}={WEIGHTS[name]}")]
    return main(["adapters", "compose", *parts, "--out", str(out), *words])


@pytest.mark.parametrize("method", ["concatenate", "svd"])
def test_an_exact_method_answers_as_the_live_stack(folders, stacked, tmp_path, method):
    assert run_compose(folders, tmp_path / "one", "--method", method) == 0

    composed = answer(PeftModel.from_pretrained(build_base(), tmp_path / "one"))
    assert ((composed - stacked).abs().max() / stacked.abs().max()).item() <= 1e-6
    assert not torch.allclose(composed, answer(build_base()), atol=1e-2)
    profile = json.loads((tmp_path / "one" / "composition.json").read_text())
    assert profile["composition"]["rank"] == read_adapter(tmp_path / "one").rank == 16
    assert profile["composition"]["largestError"] <= 1e-6
    assert [part["weight"] for part in profile["adapters"]] == list(WEIGHTS.values())


@pytest.mark.parametrize("method", ["ties", "dare-linear", "dare-ties", "svd"])
def test_the_error_of_a_lossy_composition_is_that_of_its_products(folders, method):
    parts = [Part(read_adapter(folder), WEIGHTS[name]) for name, folder in folders.items()]
    made = compose(parts, Settings(method, rank=4, seed=2))
    name = next(name for name in made.modules if name.endswith("1.self_attn.v_proj"))
    exact = sum(
        part.weight * module.scale * module.second.double() @ module.first.double()
        for part in parts
        if (module := part.adapter.modules.get(name))
    )
    found = made.modules[name].second.double() @ made.modules[name].first.double()
    assert made.errors[name] == pytest.approx(
        (torch.linalg.norm(found - exact) / torch.linalg.norm(exact)).item(), rel=1e-4
    )
    assert made.largest_error > 0.01
    assert compose(parts, Settings(method, rank=4, seed=2)).modules[name].second.equal(made.modules[name].second)


def test_the_result_is_named_by_its_content(folders, tmp_path):
    run_compose(folders, tmp_path / "one")
    run_compose(folders, tmp_path / "two")
    run_compose(folders, tmp_path / "three", "--method", "svd", "--rank", "8")
    one, two, three = (read_adapter(tmp_path / name).digest for name in ("one", "two", "three"))
    assert one == two != three


@pytest.mark.parametrize(("rank", "served"), [(1, 8), (16, 16), (17, 32), (257, 320)])
def test_a_rank_is_fitted_to_what_is_served(rank, served):
    assert fit_rank(rank) == served


def test_a_rank_that_nobody_serves_is_refused():
    with pytest.raises(TrainerError, match="512 at most"):
        fit_rank(513)


def test_a_rank_too_small_for_an_exact_method_is_refused(folders, tmp_path, capsys):
    assert run_compose(folders, tmp_path / "one", "--rank", "8") == ExitCode.USAGE
    assert "--method svd --rank 8" in capsys.readouterr().err
    assert not (tmp_path / "one").exists()


def test_linear_needs_equal_ranks(folders, tmp_path, capsys):
    assert run_compose(folders, tmp_path / "one", "--method", "linear") == ExitCode.USAGE
    assert "needs equal ranks" in capsys.readouterr().err


def test_an_adapter_of_another_base_is_refused_by_name(folders, tmp_path, capsys):
    other = shutil.copytree(folders["brief"], tmp_path / "other")
    name_base(other, "llama-13b")
    words = ("--adapter", str(folders["polite"]), "--adapter", str(other), "--out", str(tmp_path / "one"))
    assert main(["adapters", "compose", *words]) == ExitCode.NO_INPUT
    assert "its base is llama-13b" in capsys.readouterr().err


def test_an_adapter_saved_from_partitioned_weights_is_refused(folders, tmp_path, capsys):
    other = shutil.copytree(folders["polite"], tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({name: tensor[:0].clone() for name, tensor in tensors.items()}, other / "adapter_model.safetensors")
    assert main(["adapters", "inspect", str(other)]) == ExitCode.NO_INPUT
    assert "is empty" in capsys.readouterr().err


def test_inspect_tells_what_an_adapter_holds(folders, capsys):
    assert main(["adapters", "inspect", str(folders["brief"]), "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)
    assert facts["rank"] == 6
    assert facts["targets"] == ["down_proj", "q_proj"]
    assert facts["parameters"] == 2 * 6 * (32 + 32 + 64 + 32)
    assert facts["modulesWithoutEffect"] == []


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    build_base().save_pretrained(folder)
    return folder


def inspect(folder, capsys):
    capsys.readouterr()
    assert main(["adapters", "inspect", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)[0]


def write_profile(path, base_digest, folders, capsys, **settings):
    entries = [
        {
            "name": name,
            "source": str(folders[name]),
            "digest": inspect(folders[name], capsys)["digest"],
            "weight": WEIGHTS[name],
        }
        for name in WEIGHTS
    ]
    path.write_text(yaml.safe_dump({"version": 1, "base": base_digest, "adapters": entries, **settings}))
    return path


def read_files(folder):
    return {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


@pytest.mark.parametrize("method", ["concatenate", "dare-ties"])
def test_a_profile_gives_the_same_adapter_to_the_byte(folders, base, tmp_path, capsys, method):
    digest = inspect(base, capsys)["base"]
    settings = {"method": method, "rank": 16, "seed": 5}
    profile = write_profile(tmp_path / "house.yaml", digest, folders, capsys, **settings)
    words = ("--profile", str(profile), "--model", str(base))
    assert main(["adapters", "compose", *words, "--out", str(tmp_path / "one"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    again = ("--profile", str(tmp_path / "one" / "composition.json"), "--out", str(tmp_path / "deeper" / "two"))
    assert main(["adapters", "compose", *again, "--json"]) == 0

    assert read_files(tmp_path / "one") == read_files(tmp_path / "deeper" / "two")
    assert json.loads(capsys.readouterr().out)["profileDigest"] == facts["profileDigest"]
    assert facts["base"] == digest
    flags = ["--method", method, "--rank", "16", "--seed", "5", "--model", str(base)]
    assert run_compose(folders, tmp_path / "three", *flags) == 0
    assert read_files(tmp_path / "one") == read_files(tmp_path / "three")


def test_a_part_that_is_not_what_the_profile_pins_is_refused_by_name(folders, base, tmp_path, capsys):
    mine = {name: shutil.copytree(folder, tmp_path / name) for name, folder in folders.items()}
    profile = write_profile(tmp_path / "house.yaml", inspect(base, capsys)["base"], mine, capsys)
    tensors = load_file(mine["brief"] / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] * 1.001
    save_file(tensors, mine["brief"] / "adapter_model.safetensors")

    assert main(["adapters", "compose", "--profile", str(profile), "--out", str(tmp_path / "x")]) == ExitCode.NO_INPUT
    assert "adapters[1] (brief): its digest is" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_model_that_is_not_the_profiles_base_is_refused(folders, base, tmp_path, capsys):
    profile = write_profile(tmp_path / "house.yaml", "0" * 64, folders, capsys)
    words = ("--profile", str(profile), "--model", str(base), "--out", str(tmp_path / "x"))
    assert main(["adapters", "compose", *words]) == ExitCode.NO_INPUT
    assert "the profile's base is 0000" in capsys.readouterr().err


def test_an_adapter_that_was_trained_on_another_promoted_model_is_refused(folders, base, tmp_path, capsys):
    other = shutil.copytree(folders["brief"], tmp_path / "other")
    name_base(other, f"/workspace/output/{'1' * 64}")
    words = ("--adapter", str(other), "--model", str(base), "--out", str(tmp_path / "x"))
    assert main(["adapters", "compose", *words]) == ExitCode.NO_INPUT
    assert f"its base is {'1' * 64}, not" in capsys.readouterr().err


def test_an_adapter_is_told_from_others_by_its_provenance(folders, base, tmp_path, capsys):
    """What a job's promotion writes beside an adapter names the base by the digests of its files."""
    promoted = tmp_path / "promoted"
    shutil.copytree(folders["brief"], promoted / "adapter")
    name_base(promoted / "adapter", "")
    digest = inspect(base, capsys)["base"]
    weights = {"name": "model.safetensors", "size": (base / "model.safetensors").stat().st_size}
    for known, code in ((hash_file(base / "model.safetensors"), 0), ("2" * 64, ExitCode.NO_INPUT)):
        facts = {"digest": "a" * 32, "files": [{**weights, "sha256": known}]}
        (promoted / "provenance.json").write_text(json.dumps({"base_model": facts}))
        out = tmp_path / f"out-{code}"
        assert (
            main(["adapters", "compose", "--adapter", str(promoted), "--model", str(base), "--out", str(out)]) == code
        )
    assert f"not {digest}" in capsys.readouterr().err


def test_an_adapter_whose_modules_the_model_lacks_is_refused(folders, tmp_path, capsys):
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    words = ("--adapter", str(folders["brief"]), "--model", str(tmp_path / "small"), "--out", str(tmp_path / "x"))
    assert main(["adapters", "compose", *words]) == ExitCode.NO_INPUT
    assert "in " + str(tmp_path / "small") + " it is (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "llama"}, "base: 'llama' is no digest"),
        ({"method": "slerp"}, "method: 'slerp' is not known"),
        ({"adapters": []}, "adapters: no list"),
        ({"wieght": 1}, "wieght: unknown"),
        ({"version": 2}, "version: 2"),
        ({"rank": "8"}, "rank: '8'"),
    ],
)
def test_a_profile_that_cannot_work_is_refused_by_field(folders, tmp_path, capsys, change, message):
    profile = write_profile(tmp_path / "house.yaml", "0" * 64, folders, capsys)
    profile.write_text(yaml.safe_dump(yaml.safe_load(profile.read_text()) | change))
    assert main(["adapters", "compose", "--profile", str(profile), "--out", str(tmp_path / "x")]) != 0
    assert message in capsys.readouterr().err


def spoil(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.to(torch.int8), "is of type int8"),
        (lambda tensor: tensor / 0, "not finite"),
        (
            lambda tensor: tensor[:2] if tensor.shape[0] == 4 else tensor[:, :2],
            "has rank 2, adapter_config.json says 4",
        ),
    ],
)
def test_weights_that_cannot_be_composed_are_refused(folders, tmp_path, capsys, change, message):
    other = shutil.copytree(folders["polite"], tmp_path / "other")
    spoil(other, lambda tensor: change(tensor).contiguous())
    assert main(["adapters", "inspect", str(other)]) == ExitCode.NO_INPUT
    assert message in capsys.readouterr().err
