"""What the chart installs: objects, rights, settings; and which values it refuses."""

from __future__ import annotations

import json

import pytest
import yaml

from finetune_operator.api.crd import build_crd
from finetune_operator.settings import Settings
from tests.chart.conftest import CHART

SYSTEM = "finetune-system"
NAME = "finetune-operator"


def select(objects, kind):
    return [item for key, item in objects.items() if key[0] == kind]


def read_settings(objects, name=NAME, namespace=SYSTEM):
    text = objects["ConfigMap", namespace, name]["data"]["settings.yaml"]
    return Settings.model_validate(yaml.safe_load(text))


def test_the_chart_lints_cleanly(chart):
    result = chart.run("lint", str(CHART), "--strict")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_plain_install_holds_these_objects(chart):
    assert sorted(chart.render()) == sorted(
        [
            ("ClusterRole", "", NAME),
            ("ClusterRole", "", f"{NAME}-editor"),
            ("ClusterRole", "", f"{NAME}-viewer"),
            ("ClusterRoleBinding", "", NAME),
            ("ConfigMap", SYSTEM, NAME),
            ("CustomResourceDefinition", "", "finetunejobs.finetune.dev"),
            ("Deployment", SYSTEM, NAME),
            ("Role", SYSTEM, f"{NAME}-own"),
            ("RoleBinding", SYSTEM, f"{NAME}-own"),
            ("Service", SYSTEM, f"{NAME}-metrics"),
            ("Service", SYSTEM, f"{NAME}-progress"),
            ("ServiceAccount", SYSTEM, NAME),
        ]
    )


def test_the_crd_is_the_generated_one_and_is_kept(chart):
    crd = chart.render()["CustomResourceDefinition", "", "finetunejobs.finetune.dev"]
    assert crd["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert crd == build_crd()


def test_the_crd_can_be_left_out_or_let_go(chart):
    assert not select(chart.render({"crds": {"enabled": False}}), "CustomResourceDefinition")
    (crd,) = select(chart.render({"crds": {"keep": False}}), "CustomResourceDefinition")
    assert "annotations" not in crd["metadata"]


def test_an_install_for_named_namespaces_has_roles_only(chart):
    objects = chart.render({"config": {"watchNamespaces": ["team-a", "team-b"]}})
    assert not select(objects, "ClusterRole")
    assert not select(objects, "ClusterRoleBinding")
    for namespace in ("team-a", "team-b"):
        binding = objects["RoleBinding", namespace, NAME]
        assert binding["roleRef"]["name"] == objects["Role", namespace, NAME]["metadata"]["name"]
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": NAME, "namespace": SYSTEM}]
    assert read_settings(objects).watch_namespaces == ("team-a", "team-b")


def test_such_an_install_may_be_given_token_reviews_and_nothing_else(chart):
    objects = chart.render({"config": {"watchNamespaces": ["team-a"]}, "rbac": {"reviewTokens": True}})
    (role,) = select(objects, "ClusterRole")
    assert role["rules"] == [
        {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]}
    ]
    (binding,) = select(objects, "ClusterRoleBinding")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert not select(chart.render({"rbac": {"reviewTokens": True}}), "ClusterRoleBinding")[1:]


@pytest.mark.parametrize("watched", [[], ["team-a"]], ids=["cluster", "namespaced"])
def test_rights_are_the_least_that_work(chart, watched):
    objects = chart.render({"config": {"watchNamespaces": watched}})
    rules = [rule for kind in ("ClusterRole", "Role") for role in select(objects, kind) for rule in role["rules"]]
    assert rules
    for rule in rules:
        assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
        if "secrets" in rule["resources"]:
            assert not {"list", "watch"} & set(rule["verbs"])
            assert rule.get("resourceNames") == [f"{NAME}-progress-tls"] or rule["verbs"] == ["create"]
        assert not {"nodes", "roles", "rolebindings", "serviceaccounts/token", "pods/exec"} & set(rule["resources"])
    spread = objects.get(("ClusterRole", "", NAME), objects.get(("Role", "team-a", NAME)))
    assert all("secrets" not in rule["resources"] for rule in spread["rules"])


def test_namespace_roles_let_the_operator_do_the_same_as_the_cluster_role(chart):
    namespaced = chart.render({"config": {"watchNamespaces": ["a"]}})["Role", "a", NAME]["rules"]
    everywhere = chart.render()["ClusterRole", "", NAME]["rules"]
    assert [rule for rule in namespaced if rule not in everywhere] == []


def test_people_with_edit_and_view_may_work_with_jobs(chart):
    objects = chart.render()
    editor, viewer = objects["ClusterRole", "", f"{NAME}-editor"], objects["ClusterRole", "", f"{NAME}-viewer"]
    assert editor["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-edit"] == "true"
    assert viewer["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-view"] == "true"
    assert "create" in editor["rules"][0]["verbs"]
    assert viewer["rules"][0]["verbs"] == ["get", "list", "watch"]


def test_the_operators_pod_is_restricted_and_watched(chart):
    (deployment,) = select(chart.render(), "Deployment")
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"livenessProbe", "readinessProbe", "startupProbe"} <= set(container)
    assert container["resources"]["limits"]["memory"]
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == "8080"


def test_services_reach_the_ports_that_the_settings_name(chart):
    values = {"config": {"progress": {"port": 9443}, "metrics": {"port": 9090}, "health": {"port": 9091}}}
    objects = chart.render(values)
    (deployment,) = select(objects, "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"progress": 9443, "metrics": 9090, "health": 9091}
    settings = read_settings(objects)
    assert (settings.progress.port, settings.metrics.port, settings.health.port) == (9443, 9090, 9091)
    assert settings.progress.url == f"https://{NAME}-progress.{SYSTEM}.svc:9443"
    (port,) = objects["Service", SYSTEM, f"{NAME}-progress"]["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (9443, "progress")
    assert deployment["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == "9090"


def test_the_operator_accepts_every_setting_that_the_values_schema_knows(chart):
    config = {
        "images": {"imagePullPolicy": "Always", "imagePullSecrets": ["pull"]},
        "defaults": {
            "storageClassName": "fast",
            "nodeSelector": {"pool": "gpu"},
            "tolerations": [{"key": "sku", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"}],
            "gpuResourceName": "amd.com/gpu",
            "preparationResources": {"requests": {"cpu": "1"}},
            "serviceAccountName": "jobs",
        },
        "limits": {"allowedSchemes": ["s3"], "allowedServiceAccounts": ["jobs"], "maxNodes": 2, "maxGpus": 16},
        "proxies": {"httpProxy": "http://p:1", "httpsProxy": "http://p:2", "noProxy": ".svc"},
        "caBundle": "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
        "watchNamespaces": ["a"],
        "resyncSeconds": 5,
        "unschedulableSeconds": 10,
    }
    settings = read_settings(chart.render({"config": config}))
    assert settings.limits.max_gpus == 16
    assert settings.ca_bundle == config["caBundle"]
    assert settings.proxies.https_proxy == "http://p:2"
    assert settings.images.image_pull_secrets == ("pull",)


def test_the_values_schema_and_the_operator_know_the_same_settings():
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]["config"]
    model = Settings.model_json_schema(by_alias=True)
    assert set(schema["properties"]) == set(model["properties"])
    for section, item in schema["properties"].items():
        reference = model["properties"][section].get("$ref")
        if reference and section != "progress":
            names = model["$defs"][reference.rpartition("/")[2]]["properties"]
            assert set(item["properties"]) == set(names), section


def test_the_values_schema_describes_every_value_and_nothing_else():
    def walk(schema, values, path):
        if "properties" not in schema:
            return
        assert schema["additionalProperties"] is False, path
        for name, value in values.items():
            assert name in schema["properties"], f"{path}.{name}"
            if isinstance(value, dict):
                walk(schema["properties"][name], value, f"{path}.{name}")
        assert set(schema["properties"]) - {"global"} <= set(values) | {"requests", "limits"}, path

    walk(
        json.loads((CHART / "values.schema.json").read_text()), yaml.safe_load((CHART / "values.yaml").read_text()), ""
    )


REFUSED = [
    ({"config": {"limts": {}}}, "'limts' not allowed"),
    ({"image": {"pullPolicy": "Sometimes"}}, "/image/pullPolicy"),
    ({"config": {"limits": {"allowedSchemes": ["ftp"]}}}, "/config/limits/allowedSchemes/0"),
    ({"config": {"limits": {"maxGpus": -1}}}, "/config/limits/maxGpus"),
    ({"config": {"limits": {"trustRemoteCode": "yes"}}}, "/config/limits/trustRemoteCode"),
    ({"config": {"caBundle": "/etc/ssl/ca.crt"}}, "/config/caBundle"),
    ({"config": {"progress": {"port": 80}}}, "/config/progress/port"),
    ({"config": {"watchNamespaces": ["Team A"]}}, "/config/watchNamespaces/0"),
    ({"config": {"defaults": {"gpuResourceName": "gpu"}}}, "/config/defaults/gpuResourceName"),
    ({"resources": {"limits": {"memory": "lots"}}}, "/resources/limits/memory"),
    ({"replicas": 2}, "'replicas' not allowed"),
]


@pytest.mark.parametrize(("values", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_bad_values_are_refused_where_they_stand(chart, values, said):
    assert said in chart.refuse(values)


MISSING = [
    ({"image": {"repository": ""}}, "image.repository: name the operator's image"),
    ({"config": {"images": {"trainer": ""}}}, "config.images.trainer: name the trainer image"),
    ({"config": {"images": {"inference": ""}}}, "config.images.inference: name the inference image"),
]


@pytest.mark.parametrize(("values", "said"), MISSING, ids=[said.partition(":")[0] for _, said in MISSING])
def test_a_missing_image_is_asked_for_by_name(chart, values, said):
    assert said in chart.refuse(values)


def test_a_digest_wins_over_the_tag(chart):
    digest = "sha256:" + "0" * 64
    (deployment,) = select(chart.render({"image": {"tag": "1", "digest": digest}}), "Deployment")
    image = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == f"registry.example.com/finetune-operator@{digest}"


def test_changed_settings_restart_the_operator(chart):
    def read_checksum(values):
        (deployment,) = select(chart.render(values), "Deployment")
        return deployment["spec"]["template"]["metadata"]["annotations"]["checksum/settings"]

    assert read_checksum({}) == read_checksum({})
    assert read_checksum({}) != read_checksum({"config": {"limits": {"maxGpus": 8}}})


def test_optional_objects_appear_when_they_are_asked_for(chart):
    objects = chart.render(
        {"podMonitor": {"enabled": True, "labels": {"release": "prom"}}, "networkPolicy": {"enabled": True}}
    )
    assert objects["PodMonitor", SYSTEM, NAME]["metadata"]["labels"]["release"] == "prom"
    assert objects["PodMonitor", SYSTEM, f"{NAME}-jobs"]["spec"]["namespaceSelector"] == {"any": True}
    assert objects["NetworkPolicy", SYSTEM, NAME]["spec"]["policyTypes"] == ["Ingress"]


def test_another_release_name_leads_every_name(chart):
    objects = chart.render(release="ml", namespace="ml")
    names = {name for kind, _, name in objects if kind != "CustomResourceDefinition"}
    assert all(name.startswith("ml-finetune-operator") for name in names)
    url = read_settings(objects, "ml-finetune-operator", "ml").progress.url
    assert url == "https://ml-finetune-operator-progress.ml.svc:8443"


def test_the_notes_end_in_the_next_three_commands(chart):
    result = chart.run("install", NAME, str(CHART), "--dry-run=client", "--namespace", SYSTEM)
    assert result.returncode == 0, result.stderr
    notes = result.stdout.partition("NOTES:")[2]
    commands = [line.strip() for line in notes.splitlines() if line.strip().startswith("kubectl ")]
    assert commands == [
        f"kubectl --namespace {SYSTEM} rollout status deployment/{NAME}",
        "kubectl apply -f crds/examples/minimal.yaml",
        "kubectl get finetunejobs --watch",
    ]
