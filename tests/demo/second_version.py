"""The demo's last act: an adapter over the promoted model, and the roll-out to a version composed with it.

The adapter is seeded, not trained, and written without torch: what it says is of no account, that it is fetched,
checked, composed, measured, served and told apart from the model alone is.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
import time
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.demo.follow import JobFailedError, explain
from tests.demo.kubectl import Cluster
from tests.demo.tiny_llama import Shape

NAME = "accent"
KEY = f"adapters/{NAME}"
RANK = 8
STD = 1.0
"""Of the second factors: strong enough that the tiny model's answer is another one."""
TIMEOUT_SECONDS = 300
LOOK_SECONDS = 0.3


def write_adapter(folder: pathlib.Path, model: str, shape: Shape, *, seed: int = 3) -> None:
    """Write a LoRA adapter as PEFT does, over the promoted model with this digest and these sizes."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for layer in range(shape.layers):
        for name, width in (("self_attn.o_proj", shape.hidden), ("mlp.down_proj", shape.intermediate)):
            module = f"base_model.model.model.layers.{layer}.{name}"
            first = generator.normal(0.0, width**-0.5, (RANK, width))
            second = generator.normal(0.0, STD, (shape.hidden, RANK))
            tensors[f"{module}.lora_A.weight"] = first.astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = second.astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": f"/workspace/output/{model}",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["down_proj", "o_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True))


def upload_adapter(client: Any, bucket: str, key: str, model: str, shape: Shape) -> None:
    """Put an adapter over the promoted model with this digest and these sizes at s3://bucket/key."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_adapter(folder, model, shape)
        for path in sorted(folder.iterdir()):
            client.upload_file(str(path), bucket, f"{key}/{path.name}")


def add_adapter(cluster: Cluster, namespace: str, job: dict[str, Any], client: Any) -> None:
    """Upload the adapter to the demo's bucket, and name it in the finished job."""
    upload_adapter(client, "demo", KEY, job["status"]["promotion"]["digest"], Shape())
    adapter = {"name": NAME, "source": f"s3://demo/{KEY}", "secretRef": {"name": "demo-s3"}}
    patch = json.dumps({"spec": {"inference": {"adapters": [adapter]}}})
    cluster.run("patch", "finetunejob", job["metadata"]["name"], "-n", namespace, "--type=merge", "-p", patch)


def follow_rollout(cluster: Cluster, namespace: str, name: str) -> dict[str, Any]:
    """Return the job once the version with the adapter has the traffic. Raises JobFailedError."""
    started, shown = time.monotonic(), ""
    while time.monotonic() - started < TIMEOUT_SECONDS:
        job = cluster.read("finetunejob", name, "-n", namespace)
        status = job["status"]
        serving = status.get("serving") or {}
        if serving.get("ready") and serving.get("adapters") == [NAME]:
            print(f"[{time.monotonic() - started:6.1f} s] the endpoint has gone over to it", flush=True)
            return job
        conditions = {entry["type"]: entry for entry in status.get("conditions", ())}
        if conditions.get("Stalled", {}).get("status") == "True":
            raise JobFailedError(explain(status))
        message = conditions.get("Reconciling", {}).get("message") or ""
        if message and message != shown:
            shown = message
            print(f"[{time.monotonic() - started:6.1f} s] {message}", flush=True)
        time.sleep(LOOK_SECONDS)
    raise JobFailedError(f"no second version within {TIMEOUT_SECONDS} s; {explain(status)}")


def read_table(cluster: Cluster, namespace: str, endpoint: str, profile: str) -> str:
    """Return what was measured of the composition before it was served."""
    path = f"/workspace/reports/adapters-{profile}.md"
    return cluster.run("exec", "-n", namespace, f"svc/{endpoint}", "--", "cat", path).strip()
