"""Node provider for Alibaba Cloud, derived from Ray's.

Ray's provider needs the access key in the cluster definition, gives every node a public address,
requests spot instances for all nodes, and picks any network. This one reads credentials from the
environment (ALIBABA_CLOUD_ACCESS_KEY_ID and _SECRET) where `ray up` runs and from the RAM role on
the head; the network is that of the definition, and node_config decides everything else.
"""

import json
import os
from typing import Any

from aliyunsdkcore.auth.credentials import AccessKeyCredential, EcsRamRoleCredential
from aliyunsdkcore.client import AcsClient
from aliyunsdkecs.request.v20140526.RunInstancesRequest import RunInstancesRequest
from ray.autoscaler._private.aliyun.node_provider import AliyunNodeProvider
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME

PROVIDER_PARAMETERS = ("SecurityGroupId", "VSwitchId", "KeyPairName")  # from the provider section


class Nodes(AliyunNodeProvider):
    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        # Ray's class requires keys; the client that would use them is replaced
        unused = {"access_key": "", "access_key_secret": "", "cache_stopped_nodes": False}
        super().__init__({**provider_config, **unused}, cluster_name)
        key = os.environ.get("ALIBABA_CLOUD_ACCESS_KEY_ID")
        credential = (
            AccessKeyCredential(key, os.environ["ALIBABA_CLOUD_ACCESS_KEY_SECRET"])
            if key
            else EcsRamRoleCredential(provider_config["head_role"])
        )
        self.acs.cli = AcsClient(region_id=provider_config["region"], credential=credential)

    @staticmethod
    def bootstrap_config(config: dict[str, Any]) -> dict[str, Any]:
        """Return the config unchanged: networks, groups and keys exist already."""
        return config

    def create_node(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int
    ) -> dict[str, Any]:
        """Start `count` instances and return those that were started, by id."""
        request = self.request(node_config, tags, count)
        answer = json.loads(self.acs.cli.do_action_with_exception(request))
        ids = answer["InstanceIdSets"]["InstanceIdSet"]
        instances = self.acs.describe_instances(instance_ids=ids)
        return {instance["InstanceId"]: instance for instance in instances or []}

    def request(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int
    ) -> RunInstancesRequest:
        """Build the request; `node_config` holds parameters of RunInstances by name."""
        request = RunInstancesRequest()
        all_tags = {TAG_RAY_CLUSTER_NAME: self.cluster_name, **tags}
        given = {name: self.provider_config[name] for name in PROVIDER_PARAMETERS}
        parameters = {"InternetMaxBandwidthOut": 0, **given, **node_config, "Amount": count}
        for name, value in parameters.items():
            getattr(request, f"set_{name}")(value)
        request.set_Tags([{"Key": key, "Value": value} for key, value in all_tags.items()])
        return request
