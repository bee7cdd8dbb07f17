"""Real vLLM, of the inference image's version, started, probed, drained and asked as a pod of an endpoint is."""

from __future__ import annotations

import json
import random
import re
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from finetune_operator.manifests.inference import build_smoke_job
from finetune_operator.policies.serving import explain_crash
from finetune_trainer.adapters.compose import SERVED_RANKS
from finetune_trainer.data.prompts import encode_prompt
from finetune_trainer.serving.generate import Generator
from tests.support.operator_parts import make_exit, make_pod
from tests.support.vllm_pod import STARTING_SECONDS, VLLM, VllmPod, build_objects
from tests.support.waiting import eventually
from tests.unit.operator.test_deployment import make_smoke_job

QUESTION = {"role": "user", "content": "What does path.joins do?"}


def chat(pod, messages, model="support-7b", **settings):
    body = {"model": model, "messages": messages, "max_tokens": 24, "temperature": 0, "return_token_ids": True}
    return pod.ask("/v1/chat/completions", {**body, **settings})


@pytest.mark.parametrize(
    "messages",
    [
        [QUESTION],
        [{"role": "system", "content": "Be brief."}, QUESTION],
        [QUESTION, {"role": "assistant", "content": "It joins the path."}, {"role": "user", "content": "And set?"}],
        [{"role": "user", "content": " \n What about  spaces, “quotes” and 日本語?\n"}],
    ],
)
def test_the_prompt_is_that_of_training_token_by_token(plain, promoted, messages):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(promoted)
    assert chat(plain, messages)["prompt_token_ids"] == encode_prompt(messages, "wizardlm", tokenizer)


def test_its_greedy_answers_are_those_of_generate(plain, promoted):
    answer = chat(plain, [QUESTION], max_tokens=100)["choices"][0]
    assert answer["message"]["content"] == Generator(promoted, promoted=promoted).answer([QUESTION], 100).text
    assert answer["finish_reason"] == "stop", "the end of an answer was learned, and ends it"


def test_ready_means_that_a_completion_worked_under_the_endpoint_s_name(plain):
    probe = plain.container["startupProbe"]["exec"]["command"]
    assert plain.run(probe).returncode == 0
    refused = plain.run([*probe, "--model=another"])
    assert refused.returncode == 1
    assert "another" in refused.stdout
    assert urllib.request.urlopen(f"{plain.url}/health", timeout=30).status == 200


def test_the_api_key_is_asked_for_and_never_shown(plain):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(plain.request("/v1/models", key="wrong"), timeout=30)
    assert refused.value.code == 401
    assert plain.run(plain.container["startupProbe"]["exec"]["command"], INFERENCE_API_KEY="wrong").returncode == 1
    assert [each["id"] for each in plain.ask("/v1/models")["data"]] == ["support-7b"]
    assert "secret" not in plain.log


def test_the_smoke_job_s_prompt_is_answered_and_measured(run, plain, tmp_path):
    plan, served = build_objects(run)
    (container,) = build_smoke_job(plan, served.label, "image", 60)["spec"]["template"]["spec"]["containers"]
    service = next(word for word in container["command"] if word.startswith("--url="))
    command = [f"--url={plain.url}" if word == service else word for word in container["command"]]
    log = tmp_path / "termination-log"
    assert plain.run(command, FINETUNE_TERMINATION_LOG=str(log)).returncode == 0
    details = json.loads(log.read_text())["details"]
    assert 0 < details["time_to_first_token_seconds"] <= details["answer_seconds"]
    assert details["tokens"] > 0


def count_under_way(pod):
    counted = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return sum(float(line.rpartition(" ")[2]) for line in pod.read_metrics().splitlines() if line.startswith(counted))


def test_a_pod_that_goes_waits_for_the_last_answer_under_way(plain):
    # Long prompts and short answers: the engine is what is busy. Where it is faster than the server before it, as with
    # long answers of a model as small as this, the server answers no one else meanwhile.
    numbers = random.Random(0)
    prompts = [[numbers.randrange(10, 250) for _ in range(1500)] for _ in range(800)]
    body = {"model": "support-7b", "prompt": prompts, "max_tokens": 2, "ignore_eos": True}
    drain = plain.container["lifecycle"]["preStop"]["exec"]["command"]
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(plain.ask, "/v1/completions", body)
        assert eventually(lambda: count_under_way(plain), within=60, every=0.01)
        assert plain.run([word for word in drain if not word.startswith("--delay")]).returncode == 0
        assert count_under_way(plain) == 0
        assert [each["finish_reason"] for each in answer.result()["choices"]] == ["length"] * len(prompts)


def test_the_autoscaler_s_metric_is_one_that_it_has(run, plain):
    (autoscaler,) = (each for each in build_objects(run)[1].objects if each["kind"] == "HorizontalPodAutoscaler")
    name = autoscaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert re.search(rf"^{name}\{{", plain.read_metrics(), re.MULTILINE)


def test_a_composition_answers_under_the_endpoint_s_name_and_the_model_alone_beside_it(pods, run, promoted, composed):
    _, pod = pods
    listed = {each["id"]: each["parent"] for each in pod.ask("/v1/models")["data"]}
    assert listed == {"support-7b-base": None, "support-7b": "support-7b-base"}
    base = Generator(promoted, promoted=promoted)
    adapted = base.share_with_adapter(run.workspace.composed_adapter(composed["digest"]))
    for name, generator in {"support-7b-base": base, "support-7b": adapted}.items():
        text = generator.answer([QUESTION], 24).text
        assert chat(pod, [QUESTION], name)["choices"][0]["message"]["content"][:20] == text[:20]


def test_the_ranks_that_adapters_are_fitted_to_are_those_it_takes():
    (source,) = VLLM.parent.glob("lib/python*/site-packages/vllm/config/lora.py")
    (ranks,) = re.findall(r"MaxLoRARanks = Literal\[([\d, ]+)\]", source.read_text())
    assert [int(rank) for rank in ranks.split(",") if int(rank) > 1] == list(SERVED_RANKS)


def test_a_start_that_fails_leaves_its_cause_and_not_the_last_lines(run, promoted, tmp_path):
    other = tmp_path / "workspace" / "output" / promoted.name
    other.mkdir(parents=True)
    for path in promoted.iterdir():
        if path.is_file():
            (other / path.name).write_bytes(path.read_bytes())
    (weights,) = other.glob("*.safetensors")
    # As long as before, so that a look at the sizes finds nothing.
    weights.write_bytes(b"\0" * 8 + weights.read_bytes()[8:])
    pod = VllmPod(build_objects(run)[1].objects, tmp_path / "workspace", tmp_path / "container")
    try:
        code = pod.process.wait(STARTING_SECONDS)
    finally:
        pod.end()

    report = pod.report
    assert report.reason == "ServerFailed", pod.log[-3000:]
    assert "SafetensorError" in report.message
    own, _, _ = pod.log.rpartition('{"phase": "serve"')
    assert "SafetensorError" not in own.rstrip()[-2048:], "Kubernetes would have kept nothing of it"
    told = explain_crash(make_pod(make_smoke_job("x"), exit=make_exit(code, report=report)))
    assert "SafetensorError" in told
    assert "kubectl logs" in told
