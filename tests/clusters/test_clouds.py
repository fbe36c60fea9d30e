"""Requests of Ray to clouds for our definitions: AWS in moto, Alibaba Cloud by its SDK."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.tags import (
    TAG_RAY_LAUNCH_CONFIG,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from tests.clusters.definitions import autoscaling, definition


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Create an empty AWS account with the two instance profiles; return its region."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps the key of a new key pair there
    with mock_aws():
        iam = boto3.client("iam", region_name="us-west-2")
        for name in ("medgpt-head", "medgpt-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        yield "us-west-2"


def tags(role: str) -> dict[str, str]:
    return {
        TAG_RAY_NODE_KIND: "head" if role == "head" else "worker",
        TAG_RAY_NODE_NAME: f"ray-medgpt-{role}",
        TAG_RAY_NODE_STATUS: "uninitialized",
        TAG_RAY_USER_NODE_TYPE: role,
        TAG_RAY_LAUNCH_CONFIG: "hash",
    }


def test_aws_starts_each_group_as_it_is_defined(account: str) -> None:
    config = bootstrap_aws(copy.deepcopy(autoscaling("aws").get_raw_config_mutable()))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    client = boto3.client("ec2", region_name=account)
    for role, group in config["available_node_types"].items():
        (instance,) = provider.create_node(group["node_config"], tags(role), 1).values()
        (reservation,) = client.describe_instances(InstanceIds=[instance.id])["Reservations"]
        (made,) = reservation["Instances"]
        assert made["InstanceType"] == group["node_config"]["InstanceType"]
        assert made.get("InstanceLifecycle") == ("spot" if role == "data" else None)
        profile = "medgpt-head" if role == "head" else "medgpt-worker"
        assert made["IamInstanceProfile"]["Arn"].endswith(f"/{profile}")
        assert made["MetadataOptions"]["HttpTokens"] == "required"
        (security,) = made["SecurityGroups"]
        assert security["GroupName"] == "medgpt"
    (security,) = client.describe_security_groups(GroupNames=["medgpt"])["SecurityGroups"]
    for rule in security["IpPermissions"]:  # from outside ssh only, and there is no way in for it
        assert rule["UserIdGroupPairs"] or (rule["FromPort"], rule["ToPort"]) == (22, 22)


def test_alibaba_cloud_is_asked_for_each_group_without_keys_in_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("aliyunsdkecs", reason="needs aliyun-python-sdk-ecs")
    from clusters.nodes_aliyun import Nodes

    tree = definition("aliyun")
    assert "access_key" not in str(tree)
    monkeypatch.delenv("ALIBABA_CLOUD_ACCESS_KEY_ID", raising=False)
    provider = Nodes(tree["provider"], tree["cluster_name"])
    for role, group in tree["available_node_types"].items():
        request: Any = provider.request(group["node_config"], tags(role), 2)
        asked = request.get_query_params()
        assert asked["Amount"] == 2
        assert asked["InternetMaxBandwidthOut"] == 0
        assert asked["InstanceType"] == group["node_config"]["InstanceType"]
        assert asked.get("SpotStrategy") == ("SpotAsPriceGo" if role == "data" else None)
        assert asked["RamRoleName"] == ("medgpt-head" if role == "head" else "medgpt-worker")
        names = {asked[f"Tag.{n}.Key"] for n in range(1, 7)}
        assert names == {"ray-cluster-name", *tags(role)}


def test_google_cloud_accepts_all_settings_of_nodes() -> None:
    pytest.importorskip("googleapiclient", reason="needs google-api-python-client")
    import googleapiclient

    documents = Path(googleapiclient.__path__[0]) / "discovery_cache" / "documents"
    schemas = json.loads((documents / "compute.v1.json").read_text("utf-8"))["schemas"]

    def check(value: Any, schema: dict[str, Any], where: str) -> None:
        schema = schemas[schema["$ref"]] if "$ref" in schema else schema
        if isinstance(value, dict):
            assert schema["type"] == "object", where
            for key, inner in value.items():
                assert key in schema["properties"], f"{where}.{key}"
                check(inner, schema["properties"][key], f"{where}.{key}")
        elif isinstance(value, list):
            assert schema["type"] == "array", where
            for inner in value:
                check(inner, schema["items"], where)
        else:
            assert value in schema.get("enum", [value]), where

    for role, group in definition("gcp")["available_node_types"].items():
        check(group["node_config"], {"$ref": "Instance"}, role)
        assert not any("accessConfigs" in i for i in group["node_config"]["networkInterfaces"])
