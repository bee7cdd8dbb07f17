"""Good and bad jobs as pydantic judges them; tests/api judges the same files by the real API server."""

from __future__ import annotations

import pytest

from finetune_operator.api.v1alpha1 import InvalidManifestError, parse_job
from tests.support.manifests import BAD, GOOD, name_case, read_expected, read_job


@pytest.mark.parametrize("path", GOOD, ids=name_case)
def test_a_good_job_is_accepted(path):
    assert parse_job(read_job(path)).metadata.name


@pytest.mark.parametrize("path", BAD, ids=name_case)
def test_a_bad_job_is_refused_in_words_that_help(path):
    expected = read_expected(path)
    assert expected, f"{path} has no '# expect:' comment"
    with pytest.raises(InvalidManifestError) as caught:
        parse_job(read_job(path))
    for fragment in expected:
        assert fragment in str(caught.value)


def test_a_typo_gets_the_nearest_name():
    job = read_job(GOOD[0])
    job["spec"]["training"] = {"learningrate": 0.1, "deepspeed": {"zerostage": 3}}
    with pytest.raises(InvalidManifestError) as caught:
        parse_job(job)
    assert caught.value.problems == [
        "spec.training.deepspeed.zerostage: unknown field; did you mean zeroStage?",
        "spec.training.learningrate: unknown field; did you mean learningRate?",
    ]


def test_every_problem_of_a_job_is_told_at_once():
    job = read_job(GOOD[0])
    job["spec"] |= {"resources": {"nodes": 0, "memory": "64GB"}, "training": {"precision": "int8"}}
    with pytest.raises(InvalidManifestError) as caught:
        parse_job(job)
    fields = [problem.split(":")[0] for problem in caught.value.problems]
    assert fields == ["spec.training.precision", "spec.resources.nodes", "spec.resources.memory"]
