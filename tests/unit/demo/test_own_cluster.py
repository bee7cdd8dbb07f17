"""What a user gives the demo about a cluster of their own is checked before anything is done there."""

import json

import pytest

from tests.demo.kubectl import Cluster
from tests.demo.own_cluster import NEEDED, OwnClusterError, check_context, read_images, read_storage

GIVEN = dict.fromkeys(NEEDED, "given")


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_missing_is_named(name):
    with pytest.raises(OwnClusterError, match=f"also set {name};"):
        read_storage({**GIVEN, name: ""})


def test_this_machine_reaches_the_storage_as_the_pods_do_unless_told_otherwise():
    assert read_storage(GIVEN).local_endpoint == GIVEN["S3_ENDPOINT"]
    assert read_storage({**GIVEN, "S3_LOCAL_ENDPOINT": "http://127.0.0.1:9000"}).local_endpoint.endswith("9000")


def test_on_cpus_the_trainer_image_serves(tmp_path):
    path = tmp_path / "images.json"
    images = {"operator": "registry:5000/operator:v1", "trainer": "registry:5000/trainer@sha256:0a"}
    path.write_text(json.dumps(images))
    assert read_images(str(path)) == {**images, "inference": images["trainer"]}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"operator": "a:1"}', '{"operator": "a:1", "trainer": "registry:5000/trainer"}']
)
def test_images_that_cannot_be_installed_are_refused_with_an_example(tmp_path, text):
    path = tmp_path / "images.json"
    path.write_text(text)
    with pytest.raises(OwnClusterError, match=r"registry\.example\.com/trainer:v1"):
        read_images(str(path))


def test_a_context_that_gives_no_answer_is_named_with_its_file(tmp_path):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text("#!/bin/sh\necho context was not found >&2\nexit 1\n")
    kubectl.chmod(0o755)
    with pytest.raises(OwnClusterError, match="context mine of /a/kubeconfig gives no answer"):
        check_context(Cluster("/a/kubeconfig", "mine", str(kubectl)))
