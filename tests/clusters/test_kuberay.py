"""The Kubernetes manifests fit KubeRay's schemas and the claims of their documentation."""

import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.clusters.definitions import ROOT, groups, kustomized, manifest, ray_job

SCHEMAS = (
    Path(os.environ.get("MEDGPT_SHARED_SCHEMAS", ROOT.parent / "shared" / "schemas")) / "kuberay"
)
SPECS = {
    "RayCluster": manifest("cluster/raycluster.yaml")["spec"],
    "RayJob": ray_job()["spec"]["rayClusterSpec"],
}


def strict(schema: Any) -> Any:
    """Forbid unknown keys, like the API server with field validation."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    done = {key: strict(value) for key, value in schema.items()}
    named = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    loose = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    return {**done, "additionalProperties": False} if named and not loose else done


@pytest.mark.parametrize(
    ("kind", "file"), [("RayCluster", "ray.io_rayclusters.yaml"), ("RayJob", "ray.io_rayjobs.yaml")]
)
def test_a_manifest_fits_kuberays_schema(kind: str, file: str) -> None:
    if not (SCHEMAS / file).exists():
        pytest.skip(f"no {SCHEMAS / file}; set MEDGPT_SHARED_SCHEMAS to the folder of schemas")
    versions = yaml.safe_load((SCHEMAS / file).read_text("utf-8"))["spec"]["versions"]
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"]
    schema = strict(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    tree = manifest("cluster/raycluster.yaml") if kind == "RayCluster" else ray_job()
    jsonschema.validate(tree, schema)
    tree["spec"]["unknownKey"] = 1
    with pytest.raises(jsonschema.ValidationError, match="unknownKey"):
        jsonschema.validate(tree, schema)


def pods(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the pod specs by group."""
    specs = {"head": spec["headGroupSpec"]["template"]["spec"]}
    return specs | {g["groupName"]: g["template"]["spec"] for g in spec["workerGroupSpecs"]}


@pytest.mark.parametrize("kind", SPECS)
def test_pods_run_without_rights(kind: str) -> None:
    spec = SPECS[kind]
    for pod in pods(spec).values():
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"] == container["resources"]["limits"]
    dockerfile = (ROOT / "clusters/kuberay/Dockerfile").read_text("utf-8")
    assert "USER 1000:1000" in dockerfile


@pytest.mark.parametrize("kind", SPECS)
def test_authentication_is_on_and_the_token_is_a_reference(kind: str) -> None:
    spec = SPECS[kind]
    assert spec["authOptions"] == {"mode": "token", "secretName": "medgpt-ray-token"}
    up = (ROOT / "clusters/up.sh").read_text("utf-8")
    assert 'create secret generic medgpt-ray-token --from-file=auth_token="$token"' in up
    containers = [container for pod in pods(spec).values() for container in pod["containers"]]
    names = [variable["name"] for c in containers for variable in c.get("env", ())]
    assert not [name for name in names if "TOKEN" in name or "KEY" in name]


@pytest.mark.parametrize("kind", SPECS)
def test_the_autoscaler_is_v2_and_a_lost_head_is_retried(kind: str) -> None:
    spec = SPECS[kind]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert all(group["replicas"] == 0 for group in spec["workerGroupSpecs"])
    assert ray_job()["spec"]["backoffLimit"] == 3
    assert ray_job()["spec"]["shutdownAfterJobFinishes"] is True


def test_gpu_pods_are_tolerated_wired_and_have_shared_memory() -> None:
    for name, pod in pods(SPECS["RayCluster"]).items():
        (container,) = pod["containers"]
        gpus = container["resources"]["limits"].get("nvidia.com/gpu")
        assert container["image"] == ("medgpt:gpu" if gpus else "medgpt:cpu")
        assert pod["nodeSelector"] == {"medgpt/role": name}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(mounts.values()) == set(volumes)
        if name != "head":
            assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
            assert volumes[mounts["/dev/shm"]]["emptyDir"]["sizeLimit"]
            assert "/spill" in mounts
        if gpus:
            assert float(gpus) == groups("kuberay")[name].resources["GPU"]
            assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
            names = {variable["name"] for variable in container["env"]}
            assert {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} <= names


def test_the_network_lets_in_medgpt_and_the_operator_only() -> None:
    policy = manifest("cluster/network.yaml")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    own, operator = policy["ingress"]
    selected = policy["podSelector"]
    assert own == {"from": [{"podSelector": selected}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    for pod in (SPECS["RayCluster"]["headGroupSpec"], *SPECS["RayCluster"]["workerGroupSpecs"]):
        labels = pod["template"]["metadata"]["labels"]
        assert selected["matchLabels"].items() <= labels.items()
        assert labels["role"] == pod["labels"]["role"]


def test_volume_claims_and_config_maps_of_pods_exist() -> None:
    claim = manifest("cluster/storage.yaml")["metadata"]["name"]
    (generated,) = manifest("cluster/kustomization.yaml")["configMapGenerator"]
    for pod in pods(SPECS["RayCluster"]).values():
        for volume in pod["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] == claim
            if "configMap" in volume:
                assert volume["configMap"]["name"] == generated["name"]


@pytest.mark.parametrize("folder", ["cluster", "job"])
def test_kustomize_builds_the_manifests_that_are_tested(folder: str) -> None:
    made = kustomized(folder)
    if made is None:
        pytest.skip("no kubectl on this machine")
    kinds = {tree["kind"]: tree for tree in made}
    (ray,) = kinds.keys() & SPECS.keys()
    assert set(kinds) == {ray, "ConfigMap", "NetworkPolicy", "PersistentVolumeClaim"}
    assert ray == {"cluster": "RayCluster", "job": "RayJob"}[folder]
    spec = kinds[ray]["spec"]
    assert (spec if ray == "RayCluster" else spec["rayClusterSpec"]) == SPECS[ray]
