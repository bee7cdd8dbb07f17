"""Publishes a release: builds and pushes the images, packages the chart that names them by digest, and pushes it.

`make release VERSION=v1.2.3 REGISTRY=registry.example.com/finetune` calls this. It needs Docker with BuildKit, Helm and
a login to the registry. The checkout is not changed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
CHART = "finetune-operator"
IMAGES = ("operator", "trainer", "inference")


def main() -> int:
    """Publish the release that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--version", required=True, help="the tag, as in v1.2.3")
    parser.add_argument("--registry", required=True, help="registry and path, as in registry.example.com/finetune")
    parser.add_argument("--helm", default="helm", help="the Helm program (default: %(default)s)")
    arguments = parser.parse_args()
    version = arguments.version.removeprefix("v")
    if not re.fullmatch(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?", version):
        parser.error(f"--version: {arguments.version} is no version: write it as in v1.2.3 or v1.2.3-rc.1")
    if not arguments.registry:
        parser.error("--registry: name a registry, as in registry.example.com/finetune")
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        images = {name: push_image(name, version, arguments.registry, folder) for name in IMAGES}
        package = package_chart(version, images, arguments.helm, folder)
        run(arguments.helm, "push", str(package), f"oci://{arguments.registry}/charts")
    print(json.dumps({"version": version, "images": images}, indent=2))
    return 0


def push_image(name: str, version: str, registry: str, scratch: pathlib.Path) -> str:
    """Build and push one image; return its reference by digest."""
    repository = f"{registry}/{name}"
    report = scratch / f"{name}.json"
    revision = read_revision()
    run(
        *("docker", "buildx", "build", "--push", "--provenance=true", "--sbom=true"),
        *("--file", f"images/{name}/Dockerfile", "--tag", f"{repository}:{version}", "--metadata-file", str(report)),
        *("--build-arg", f"VERSION={version}", "--build-arg", f"REVISION={revision}", "."),
    )
    digest = json.loads(report.read_text())["containerimage.digest"]
    return f"{repository}@{digest}"


def read_revision() -> str:
    """Return the commit that is released."""
    command = ("git", "rev-parse", "HEAD")
    return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.strip()


def package_chart(version: str, images: dict[str, str], helm: str, scratch: pathlib.Path) -> pathlib.Path:
    """Package a copy of the chart whose values name the images by digest; return the archive."""
    copy = scratch / CHART
    shutil.copytree(REPOSITORY / "charts" / CHART, copy)
    values = copy / "values.yaml"
    values.write_text(pin_images(values.read_text(), images))
    run(helm, "package", str(copy), "--version", version, "--app-version", version, "--destination", str(scratch))
    return scratch / f"{CHART}-{version}.tgz"


def pin_images(values: str, images: dict[str, str]) -> str:
    """Return the chart's values with the images filled in, comments kept."""
    repository, _, digest = images["operator"].partition("@")
    for name, value in (
        *(("repository", repository), ("digest", digest)),
        *(("trainer", images["trainer"]), ("inference", images["inference"])),
    ):
        values, found = re.subn(rf'^( +{name}:) ""$', rf'\1 "{value}"', values, flags=re.MULTILINE)
        if found != 1:
            raise SystemExit(f'values.yaml: expected one line `{name}: ""`, found {found}')
    return values


def run(*command: str) -> None:
    """Run a command in the repository; end with its name when it fails."""
    print("+ " + " ".join(command), file=sys.stderr, flush=True)
    if subprocess.run(command, cwd=REPOSITORY, check=False, stdout=sys.stderr).returncode:
        raise SystemExit(f"release: {' '.join(command[:3])} failed")


if __name__ == "__main__":
    sys.exit(main())
