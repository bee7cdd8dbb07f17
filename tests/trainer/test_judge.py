"""A judge of the data with a real, tiny classifier: random weights, read from a folder as any other."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest

from finetune_trainer.classifier import load_classifier
from finetune_trainer.errors import TrainerError
from tests.support import tiny_models
from tests.support.training_runs import build_texts

TEXTS = [f"{'word ' * length}{length}" for length in (1, 700, 3, 40, 41, 5, 2, 0, 90)]


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Folders of tiny classifiers, by family."""
    return tiny_models.build_tiny_classifiers(tmp_path_factory.mktemp("judges"), build_texts())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_score_is_a_probability_and_does_not_depend_on_what_is_scored_with_it(judges, family):
    classifier = load_classifier(judges[family])
    scores = classifier.score(TEXTS)
    alone = [classifier.score([text])[0] for text in TEXTS]
    assert scores == pytest.approx(alone, abs=1e-5)
    assert all(0 <= score <= 1 for score in scores)
    assert len(set(scores)) > 3
    assert classifier.score([]) == []


def test_labels_share_the_probability(judges):
    both = [load_classifier(judges["bert"], [label]).score(TEXTS) for label in ("0", "REFUSAL")]
    assert [sum(pair) for pair in zip(*both, strict=True)] == pytest.approx([1.0] * len(TEXTS))


def test_a_model_without_a_classifiers_head_is_refused(models):
    with pytest.raises(TrainerError, match=r"is no sequence classifier: it has no score.weight"):
        load_classifier(models["llama"])


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(TrainerError) as refused:
        load_classifier(tmp_path)
    assert str(tmp_path) in refused.value.message
    assert "--judge" in refused.value.hint


def test_code_that_comes_with_a_classifier_is_not_run(judges, tmp_path):
    folder = tmp_path / "judge"
    shutil.copytree(judges["bert"], folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names, "model_type": "evil"}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(TrainerError):
        load_classifier(folder)
    assert not (tmp_path / "ran").exists()
