"""Weight sync against a plain gloo broadcast of the same bytes, between the same two workers.

    python -m tests.bench.weight_sync

The actor worker holds a float32 model, the rollout worker another one of the same size. A round is
one sync, which packs, sends, checks and loads every weight under a version, and one broadcast of a
single tensor with as many bytes. A sync is timed by the driver, calls to the workers included; the
broadcast inside its worker. Each process has one thread.
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from medgpt.cluster import ray_init
from medgpt.config.pools import PoolsConfig, RoleConfig, SyncConfig
from medgpt.engine.export import gather_merged_weights
from medgpt.models.lora import merged_weights
from medgpt.rlhf.pools.pool import Pool
from medgpt.rlhf.pools.pools import Pools
from medgpt.rlhf.rollout_batch import NO_VERSION
from medgpt.rlhf.weight_sync import process_group
from medgpt.rlhf.weight_sync.sync import WeightSync
from tests.bench.common import Size, ratios, spread

WARM_UP = 2  # rounds


class FakeModel:
    """Sends or receives the weights of a model, as the actor and the rollout role do."""

    def __init__(self, size: Size) -> None:
        config = Qwen2Config(
            vocab_size=size.vocab,
            hidden_size=size.hidden,
            intermediate_size=size.hidden * 11 // 4,
            num_hidden_layers=size.layers,
            num_attention_heads=size.hidden // 64,
            num_key_value_heads=size.hidden // 64,
            tie_word_embeddings=True,
        )
        self.model = Qwen2ForCausalLM(config)
        self.parameters = dict(self.model.named_parameters())
        self.weight_version, self.sync = NO_VERSION, process_group.SyncState()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return gather_merged_weights(merged_weights(self.model))

    @torch.no_grad()
    def load_weights(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            self.parameters[name].copy_(weight)

    def weights_loaded(self, version: int) -> None:
        self.weight_version = version

    def broadcast(self, num_bytes: int) -> float:
        """Return the seconds of a broadcast over the process group."""
        end = self.sync.group
        assert end is not None
        tensor = torch.zeros(num_bytes, dtype=torch.uint8)
        end.group.broadcast(torch.zeros(1), 0).wait()  # both are there
        began = time.perf_counter()
        end.group.broadcast(tensor, 0).wait()
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--size", type=Size.parse, default="1024x8x16000", metavar="HxLxV")
    parser.add_argument("--bucket-mb", type=int, default=SyncConfig().bucket_mb)
    arguments = parser.parse_args()

    ray_init.start_local(4)
    make, role = partial(FakeModel, arguments.size), RoleConfig()
    pools = Pools(
        [Pool("actor", role, make), Pool("rollout", role, make, independent=True)],
        PoolsConfig(),
        wait_s=60,
        say=print,
    )
    pools.start()
    actor, rollout = pools.pools.values()
    sync = WeightSync(actor, rollout, pools, SyncConfig(bucket_mb=arguments.bucket_mb))
    ours, plain, size = [], [], 0.0
    for version in range(WARM_UP + arguments.rounds):
        metrics = sync.run(version)
        size = metrics["sync/gb"]
        args = (FakeModel.broadcast, int(size * 2**30))
        seconds = max(pools.get(actor.call(*args) + rollout.call(*args), "broadcast"))
        if version >= WARM_UP:
            ours.append(size / metrics["time/sync_s"])
            plain.append(size / seconds)
    pools.close()
    print(
        f"{size * 1024:.0f} MiB, {arguments.bucket_mb} MiB a bucket, load {os.getloadavg()[0]:.1f}"
    )
    print(f"weight sync      {spread(ours)} GiB/s")
    print(f"plain broadcast  {spread(plain)} GiB/s")
    print(f"sync / broadcast {spread(ratios(ours, plain))}")


if __name__ == "__main__":
    main()
