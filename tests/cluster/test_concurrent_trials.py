import math

from medgpt.cluster.capacity import NodeGroup, max_concurrent_trials
from medgpt.config.pools import RoleConfig

SMALL = RoleConfig(cpus_per_worker=0.25)
TRIAL = dict.fromkeys(("actor", "critic", "rollout"), SMALL)
SHARED = dict.fromkeys(("reward", "reference"), SMALL)
LARGE = RoleConfig(num_workers=4, cpus_per_worker=1, gpus_per_worker=1)


def num_trials(*nodes: NodeGroup, trial=TRIAL, shared=SHARED, limit=8) -> int:
    return max_concurrent_trials(trial, shared, nodes, data_cpus=1, limit=limit)


def node(cpus: float, gpus: float = 0, count: float = 1, labels=None) -> NodeGroup:
    return NodeGroup({"CPU": cpus, "GPU": gpus}, labels, count)


def test_trials_share_the_resources_left_by_shared_pools_and_data():
    assert num_trials(node(3)) == 2  # 3 - 1 - 0.5 holds two of 0.75
    assert num_trials(node(2.2)) == 0
    assert num_trials(node(1)) == 0
    assert num_trials(node(3), shared={}) == 2
    assert num_trials(node(30)) == 8  # no more than there are


def test_workers_do_not_spread_over_nodes():
    trial = {"actor": LARGE, "rollout": LARGE}
    assert num_trials(node(9, 8), node(9, 8), trial=trial, shared={}) == 2
    single_role_trial = {"actor": RoleConfig(cpus_per_worker=1, gpus_per_worker=3)}
    assert num_trials(node(9, 4), node(9, 4), trial=single_role_trial, shared={}) == 2  # not 8 / 3


def test_an_autoscaler_without_limit_has_room_for_all_trials():
    assert num_trials(node(4, 4, count=math.inf), trial={"actor": LARGE}, limit=5) == 5


def test_labels_and_shared_bundles_are_respected():
    labelled = {"actor": RoleConfig(labels={"zone": "a"}), "critic": RoleConfig(share_with="actor")}
    nodes = (node(2, labels={"zone": "a"}), node(8, labels={"zone": "b"}))
    assert num_trials(*nodes, trial=labelled, shared={}, limit=4) == 1
