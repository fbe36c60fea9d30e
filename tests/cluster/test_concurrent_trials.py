import math

from medgpt.cluster.capacity import Nodes
from medgpt.cluster.concurrent_trials import concurrent_trials
from medgpt.config.pools import RoleConfig

SMALL = RoleConfig(cpus_per_worker=0.25)
TRIAL = dict.fromkeys(("actor", "critic", "rollout"), SMALL)
SHARED = dict.fromkeys(("reward", "reference"), SMALL)
LARGE = RoleConfig(num_workers=4, cpus_per_worker=1, gpus_per_worker=1)


def room(*nodes: Nodes, trial=TRIAL, shared=SHARED, limit=8) -> int:
    return concurrent_trials(trial, shared, nodes, data_cpus=1, limit=limit)


def node(cpus: float, gpus: float = 0, count: float = 1, labels=None) -> Nodes:
    return Nodes({"CPU": cpus, "GPU": gpus}, labels, count)


def test_trials_share_what_the_shared_pools_and_data_leave():
    assert room(node(3)) == 2  # 3 - 1 - 0.5 holds two of 0.75
    assert room(node(2.2)) == 0
    assert room(node(1)) == 0
    assert room(node(3), shared={}) == 2
    assert room(node(30)) == 8  # no more than there are


def test_workers_do_not_spread_over_nodes():
    trial = {"actor": LARGE, "rollout": LARGE}
    assert room(node(9, 8), node(9, 8), trial=trial, shared={}) == 2
    whole = {"actor": RoleConfig(cpus_per_worker=1, gpus_per_worker=3)}
    assert room(node(9, 4), node(9, 4), trial=whole, shared={}) == 2  # not 8 / 3


def test_an_autoscaler_without_limit_has_room_for_all():
    assert room(node(4, 4, count=math.inf), trial={"actor": LARGE}, limit=5) == 5


def test_labels_and_sharing_count():
    labelled = {"actor": RoleConfig(labels={"zone": "a"}), "critic": RoleConfig(share_with="actor")}
    nodes = (node(2, labels={"zone": "a"}), node(8, labels={"zone": "b"}))
    assert room(*nodes, trial=labelled, shared={}, limit=4) == 1
