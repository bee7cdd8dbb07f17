"""The settings of a run travel as JSON without loss, and nothing unknown is ever guessed at."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_contract import run_config
from finetune_contract.parsing import RunConfigError
from finetune_contract.run_config import DatasetConfig, JudgeConfig, RunConfig, Source, TrainingConfig

numbers = st.floats(allow_nan=False)
sources = st.builds(Source, source=st.text(), weight=numbers)
datasets = st.builds(
    DatasetConfig,
    sources=st.lists(sources, max_size=3).map(tuple),
    fields=st.dictionaries(st.text(), st.text(), max_size=3),
    holdout_fraction=numbers,
    judge=st.builds(JudgeConfig, rows=st.sampled_from(run_config.JUDGED_ROWS)),
)
trainings = st.builds(
    TrainingConfig,
    epochs=numbers,
    learning_rate=numbers,
    deepspeed_config=st.dictionaries(st.text(), st.integers() | st.text() | st.booleans(), max_size=3),
)
runs = st.builds(RunConfig, model=sources, dataset=datasets, training=trainings)


def make_run(**changes):
    base = RunConfig(model=Source("hf://a/b", "main"), dataset=DatasetConfig(sources=(Source("s3://b/k"),)))
    return dataclasses.replace(base, **changes)


@settings(max_examples=50, deadline=None)
@given(runs)
def test_any_run_survives_the_journey_through_json(run):
    assert RunConfig.from_json(run.to_json()) == run


def test_equal_settings_give_equal_text():
    assert make_run().to_json() == make_run().to_json()


def test_a_field_that_older_images_do_not_know_is_sent_only_when_it_is_set():
    usual = make_run()
    assert "rows" not in json.loads(usual.to_json())["dataset"]["judge"]
    every = dataclasses.replace(usual.dataset, judge=JudgeConfig("hf://a/judge", rows="all"))
    assert json.loads(make_run(dataset=every).to_json())["dataset"]["judge"]["rows"] == "all"
    assert "lora_quantization" not in json.loads(usual.to_json())["training"]
    quantized = make_run(training=TrainingConfig(method="lora", lora_quantization="nf4"))
    assert json.loads(quantized.to_json())["training"]["lora_quantization"] == "nf4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(version=2), "version: this image reads run configurations of version 1, not 2"),
        (lambda data: data.update(surprise=1), r"run configuration\.surprise: unknown field"),
        (lambda data: data["training"].update(epocs=1), r"training\.epocs: unknown field"),
        (lambda data: data["training"].update(epochs="3"), r"training\.epochs: expected float, found '3'"),
        (lambda data: data["training"].update(max_steps=True), r"training\.max_steps: expected int, found True"),
        (lambda data: data["dataset"].pop("sources"), r"dataset\.sources: missing"),
        (lambda data: data["dataset"].update(sources={}), r"dataset\.sources: expected a list"),
        (lambda data: data["dataset"].update(sources=["x"]), r"dataset\.sources\[0\]: expected an object"),
        (lambda data: data["dataset"].update(fields=[]), r"dataset\.fields: expected an object"),
    ],
)
def test_what_is_not_a_run_is_refused_by_the_name_of_its_field(change, message):
    data = json.loads(make_run().to_json())
    change(data)
    with pytest.raises(RunConfigError, match=message):
        RunConfig.from_json(json.dumps(data))


def test_text_that_is_not_json_is_refused():
    with pytest.raises(RunConfigError, match="not JSON"):
        RunConfig.from_json("{")


def test_the_version_is_part_of_every_configuration():
    assert json.loads(make_run().to_json())["version"] == run_config.VERSION
