"""From nothing to a served model: what `make demo` runs once the cluster and the images are there.

Seeds an S3 bucket with real text and a tiny base model, installs the chart, applies crds/examples/demo.yaml, kills a
training pod in the middle, follows the job to its endpoint, and checks what it claims; then adds an adapter and follows
the roll-out to a second version. Exits 0 only if all of it holds.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import tempfile
import time
import urllib.request
from typing import Any

import boto3
import boto3.exceptions
import botocore.config
import botocore.exceptions
import yaml

from tests.demo import corpus, second_version, tiny_llama
from tests.demo.follow import Follower, JobFailedError
from tests.demo.kubectl import Cluster, ClusterError

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "crds" / "examples" / "demo.yaml"
CHART = REPOSITORY / "charts" / "finetune-operator"
OPERATOR_NAMESPACE = "finetune-system"
NAMESPACE = "finetune-demo"
NUM_ROWS = 3000
PROMPT = "What does `str.partition` do?"
JOB_TIMEOUT_SECONDS = 1200


@dataclasses.dataclass(frozen=True)
class Storage:
    """An S3 account, as pods reach it and as this machine reaches it."""

    pod_endpoint: str
    local_endpoint: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"


class CheckFailedError(RuntimeError):
    """Something that the demo promises is not so."""


def make_s3_client(storage: Storage) -> Any:
    """Return a boto3 client of the account, as this machine reaches it."""
    return boto3.client(
        "s3",
        endpoint_url=storage.local_endpoint,
        aws_access_key_id=storage.access_key,
        aws_secret_access_key=storage.secret_key,
        region_name=storage.region,
        config=botocore.config.Config(
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def seed_storage(storage: Storage) -> None:
    """Put the data set and the base model where the example's URLs point."""
    client = make_s3_client(storage)
    try:
        client.head_bucket(Bucket="demo")
    except botocore.exceptions.ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise
        client.create_bucket(Bucket="demo")
    rows = corpus.make_corpus(NUM_ROWS).rows
    client.put_object(Bucket="demo", Key="datasets/python-docs.json", Body=json.dumps(rows, indent=1).encode())
    with tempfile.TemporaryDirectory() as folder:
        model = pathlib.Path(folder)
        parameters = tiny_llama.write_tiny_llama(model, (f"{row['instruction']} {row['output']}" for row in rows))
        for path in sorted(model.iterdir()):
            client.upload_file(str(path), "demo", f"models/tiny-llama/{path.name}")
    print(
        f"  data set: {len(rows)} rows of Python's documentation; base model: Llama, {parameters:,} parameters",
        flush=True,
    )


def _seed(storage: Storage) -> None:
    try:
        seed_storage(storage)
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, boto3.exceptions.Boto3Error) as error:
        raise CheckFailedError(
            f"the S3 server {storage.local_endpoint} did not take the demo's files: {error}; the keys need a bucket "
            "`demo` that they may write to, or the right to make one"
        ) from error


def install_chart(cluster: Cluster, images: dict[str, str]) -> None:
    """Install or upgrade the operator with Helm and wait until it is ready."""
    repository, _, tag = images["operator"].rpartition(":")
    cluster.run_helm(
        *(
            "upgrade",
            "--install",
            "finetune-operator",
            str(CHART),
            "--namespace",
            OPERATOR_NAMESPACE,
            "--create-namespace",
        ),
        *("--set", f"image.repository={repository}", "--set-string", f"image.tag={tag}"),
        *("--set-string", f"config.images.trainer={images['trainer']}"),
        *("--set-string", f"config.images.inference={images['inference']}"),
        # Small pods for a small cluster: what is reserved and not used would keep others from being scheduled.
        *("--set", "config.defaults.preparationResources.requests.cpu=50m"),
        *("--set", "config.defaults.preparationResources.requests.memory=256Mi"),
        *("--wait", "--timeout", "180s"),
    )


def apply_job(cluster: Cluster, storage: Storage, namespace: str) -> str:
    """Create the namespace and the Secret, apply the example with kubectl, and return the job's name."""
    name: str = yaml.safe_load(EXAMPLE.read_text())["metadata"]["name"]
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    keys = {
        "AWS_ACCESS_KEY_ID": storage.access_key,
        "AWS_SECRET_ACCESS_KEY": storage.secret_key,
        "AWS_ENDPOINT_URL_S3": storage.pod_endpoint,
        "AWS_REGION": storage.region,
    }
    cluster.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}},
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "demo-s3", "namespace": namespace},
            "stringData": keys,
        },
    )
    _delete_earlier_run(cluster, namespace, name)
    cluster.run("apply", "-n", namespace, "-f", str(EXAMPLE))
    return name


def _delete_earlier_run(cluster: Cluster, namespace: str, name: str) -> None:
    """A second demo starts from nothing: the job of an earlier one goes, with its workspace and endpoint."""
    cluster.run("delete", "finetunejob", name, "-n", namespace, "--ignore-not-found", "--timeout=120s", timeout=130)
    cluster.run(
        "delete", "pvc", f"{name}-workspace", "-n", namespace, "--ignore-not-found", "--timeout=120s", timeout=130
    )


class PodKiller:
    """Kills the training pod once, when a complete checkpoint exists and training is under way."""

    def __init__(self, cluster: Cluster, namespace: str, name: str) -> None:
        self._cluster, self._namespace, self._name = cluster, namespace, name
        self.killed_at: int | None = None
        self.say = print

    def __call__(self, status: dict[str, Any]) -> None:
        progress, checkpoints = status.get("progress") or {}, status.get("checkpoints") or {}
        step, total = progress.get("step") or 0, progress.get("totalSteps") or 0
        complete = checkpoints.get("latestComplete") or 0
        if self.killed_at is not None or not total or not complete or step <= complete or step < total // 3:
            return
        selector = f"finetune.dev/job={self._name},finetune.dev/component=train"
        pods = self._cluster.read("pods", "-n", self._namespace, "-l", selector)["items"]
        running = [pod["metadata"]["name"] for pod in pods if pod["status"].get("phase") == "Running"]
        if running:
            self.killed_at = step
            self.say(f"Killing     pod {running[0]} at step {step}; the last complete checkpoint is {complete}")
            arguments = ("delete", "pod", running[0], "-n", self._namespace, "--grace-period=0", "--force")
            self._cluster.run(*arguments)


def ask(url: str, model: str, prompt: str) -> str:
    """Ask the endpoint one question through /v1/chat/completions, greedily."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 48, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    content: str = answer["choices"][0]["message"]["content"]
    return content


def generate(cluster: Cluster, namespace: str, endpoint: str, model: str, *options: str) -> str:
    """Run `finetune-trainer generate` beside the server, on one model of the same workspace."""
    command = ("finetune-trainer", "generate", "--model", model, "--prompt", PROMPT, "--max-new-tokens", "48", "--json")
    command = (*command, *options)
    output = cluster.run("exec", "-n", namespace, f"svc/{endpoint}", "--", *command, timeout=300)
    answer: str = json.loads(output.strip().splitlines()[-1])["text"]
    return answer


def check(condition: bool, promise: str) -> None:
    """Print one promise with its verdict. Raises CheckFailedError when it does not hold."""
    print(f"  {'ok  ' if condition else 'FAIL'} {promise}", flush=True)
    if not condition:
        raise CheckFailedError(promise)


def report(cluster: Cluster, namespace: str, job: dict[str, Any], killer: PodKiller) -> str:
    """Print what the job and its endpoint say, check each promise, and return the endpoint's answer."""
    status = job["status"]
    dataset, checkpoints, serving = status["dataset"], status["checkpoints"], status["serving"]
    tuned = status["evaluation"]["scores"]["holdout"]
    base = status["evaluation"]["baseline"]["holdout"]
    digest = status["promotion"]["digest"]
    print("\nWhat the job says:")
    print(f"  rows        read {dataset['rowsRead']}, kept {dataset['rowsKept']}, removed {dataset['rowsRemoved']}")
    print(
        f"  checkpoints {checkpoints['count']} kept, latest at step {checkpoints['latestComplete']}, "
        f"resumed from step {checkpoints['resumedFrom']}"
    )
    print(
        f"  held-out    loss {base['loss']:.3f} before, {tuned['loss']:.3f} after, "
        f"unigram entropy {tuned['unigram_entropy']:.3f} (nats per answer token)"
    )
    print(f"  endpoint    {serving['url']}  model {serving['model']}  digest {digest}")
    page = status["promotion"].get("report")
    print(f"  run report  /workspace/{page}")
    endpoint = job["spec"].get("inference", {}).get("endpoint") or job["metadata"]["name"]
    with cluster.forward(namespace, f"svc/{endpoint}", 80) as url:
        answer = ask(url, serving["model"], PROMPT)
    print(f"  question    {PROMPT}\n  answer      {answer!r}\n\nWhat that proves:")
    planted = len(corpus.make_corpus(NUM_ROWS).planted)
    check(dataset["rowsRead"] == NUM_ROWS, f"all {NUM_ROWS} rows were read")
    check(
        planted <= dataset["rowsRemoved"] <= planted * 1.5,
        f"the filter removed the {planted} planted rows and few others",
    )
    check(tuned["loss"] < base["loss"], "held-out loss is below the base's")
    check(tuned["loss"] < tuned["unigram_entropy"], "held-out loss is below the answers' unigram entropy")
    check(
        killer.killed_at is not None and status["restarts"] >= 1,
        f"a pod killed at step {killer.killed_at} was survived",
    )
    check(
        bool(checkpoints["resumedFrom"]), f"training resumed from the complete checkpoint {checkpoints['resumedFrom']}"
    )
    check(bool(page), "the run left a report")
    promoted = generate(cluster, namespace, endpoint, f"/workspace/output/{digest}")
    check(answer == promoted, "the endpoint's greedy answer equals `generate` on the promoted digest")
    original = generate(cluster, namespace, endpoint, "/workspace/models/base", "--prompt-template", "alpaca")
    check(answer != original, "and differs from the base model's")
    return answer


def roll_out(cluster: Cluster, storage: Storage, namespace: str, job: dict[str, Any], first_answer: str) -> None:
    """Add an adapter to the finished job, and check what the endpoint answers then."""
    first = job["status"]["serving"]
    print(f"\nAdding the adapter {second_version.NAME} to spec.inference.adapters", flush=True)
    second_version.add_adapter(cluster, namespace, job, make_s3_client(storage))
    serving = second_version.follow_rollout(cluster, namespace, job["metadata"]["name"])["status"]["serving"]
    endpoint = job["spec"].get("inference", {}).get("endpoint") or job["metadata"]["name"]
    print(second_version.read_table(cluster, namespace, endpoint, serving["profile"]))
    with cluster.forward(namespace, f"svc/{endpoint}", 80) as url:
        answer, alone = (ask(url, model, PROMPT) for model in (serving["model"], f"{serving['model']}-base"))
    print(f"  version     {first['version']}\n  answer      {first_answer!r}")
    print(f"  version     {serving['version']}\n  answer      {answer!r}\n\nWhat that proves:")
    check(serving["digest"] == first["digest"], "the second version is the same promoted model")
    check(serving["version"] == f"{first['version']}.{serving['profile']}", "with a profile of adapters over it")
    check(answer != first_answer, "it answers otherwise under the same name")
    check(alone == first_answer, f"{serving['model']}-base still answers as the first version did")


def run_demo(cluster: Cluster, storage: Storage, images: dict[str, str]) -> int:
    """Seed, install, apply, follow, check. Returns the exit status."""
    started = time.monotonic()
    try:
        print("Seeding the bucket s3://demo", flush=True)
        _seed(storage)
        print(f"Installing the chart into {OPERATOR_NAMESPACE} on context {cluster.context}", flush=True)
        install_chart(cluster, images)
        print(f"Applying {EXAMPLE.relative_to(REPOSITORY)} in {NAMESPACE}", flush=True)
        name = apply_job(cluster, storage, NAMESPACE)
        killer = PodKiller(cluster, NAMESPACE, name)
        follower = Follower(cluster, NAMESPACE, name, killer)
        killer.say = follower.say
        job = follower.follow(JOB_TIMEOUT_SECONDS)
        answer = report(cluster, NAMESPACE, job, killer)
        roll_out(cluster, storage, NAMESPACE, job, answer)
    except (ClusterError, JobFailedError, CheckFailedError) as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1
    print(f"\nAll of it holds, {time.monotonic() - started:.0f} s after the start of the seeding.")
    return 0
