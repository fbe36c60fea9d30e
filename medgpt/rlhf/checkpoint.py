"""PPO state and its checkpoints, which are complete or do not exist."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from medgpt.algos.kl import AdaptiveKL
from medgpt.artifacts import FileEntry, Folder, commit, file_entries
from medgpt.config.ppo import PPOConfig
from medgpt.rlhf.experience import RunningStats
from medgpt.rlhf.pools.pools import Pools
from medgpt.rlhf.rollout_batch import Ragged, Sequences
from medgpt.runs import Run

IN_FLIGHT_FILE = "in-flight.npz"
RAGGED_FIELDS = ("prompts", "responses")
FLAT_FIELDS = ("index", "logprobs", "finished")


@dataclass
class PPOState:
    """Training state besides the models. Randomness and the order of the prompts are functions of
    the seed and the iteration, so nothing else needs saving."""

    iteration: int = 0
    """Iterations done; determines the next prompts and the actor's weight version."""
    kl_coef: float = 0.0
    score_stats: RunningStats = field(default_factory=RunningStats)
    time_s: float = 0.0

    @staticmethod
    def from_manifest(state: dict[str, Any]) -> "PPOState":
        return PPOState(**{**state, "score_stats": RunningStats(*state["score_stats"])})


def next_kl_coef(kl_coef: float, mean_kl: float, num_sequences: int, config: PPOConfig) -> float:
    """Return the KL coefficient of the next iteration."""
    if config.kl_controller == "fixed" or not num_sequences:
        return kl_coef
    controller = AdaptiveKL(kl_coef, config.kl_target, config.kl_horizon)
    controller.update(mean_kl, num_sequences)
    return controller.coef


class PendingCheckpoint:
    """A checkpoint that is being written. It exists once its manifest is written, last.

    Args:
        refs: by subfolder, the lists of files that its writers return.
    """

    def __init__(self, run: Run, state: PPOState, refs: Mapping[str, Sequence[Any]]) -> None:
        self.run, self.refs, self.iteration = run, refs, state.iteration
        self.manifest_state = asdict(state) | {"score_stats": list(state.score_stats)}

    def finish(self, pools: Pools, *, in_flight: Sequences | None, keep: int) -> None:
        """Wait for all files, commit the checkpoint and remove all but the `keep` newest ones."""
        folder = self.run.checkpoint(self.iteration)
        files = [
            FileEntry(f"{name}/{file.name}", file.size, file.xxh128)
            for name, refs in self.refs.items()
            for written in pools.get(refs, "save")
            for file in written
        ]
        if in_flight is not None:
            files += write_sequences(folder, in_flight)
        commit(folder, files, state=self.manifest_state)
        self.run.prune_checkpoints(newest=self.iteration, keep=keep, best_step=None)


def newest_checkpoint(run: Run) -> tuple[Folder, PPOState] | None:
    """Return folder and state of the newest complete checkpoint, if there is one."""
    if (checkpoint := run.newest_checkpoint()) is None:
        return None
    folder, manifest = checkpoint
    return folder, PPOState.from_manifest(manifest["state"])


def write_sequences(folder: Folder, sequences: Sequences) -> list[FileEntry]:
    """Write rollouts that were sampled but not yet trained on."""
    arrays: dict[str, Any] = {name: getattr(sequences, name) for name in FLAT_FIELDS}
    for name in RAGGED_FIELDS:
        ragged = getattr(sequences, name)
        arrays |= {name: ragged.values, f"{name}_offsets": ragged.offsets}
    metadata = {"sample_ids": sequences.sample_ids, "weight_version": sequences.weight_version}
    with folder.staging() as directory:
        np.savez(directory / IN_FLIGHT_FILE, facts=np.array(json.dumps(metadata)), **arrays)
        return file_entries(directory, [IN_FLIGHT_FILE])


def read_sequences(folder: Folder) -> Sequences | None:
    if not folder.exists(IN_FLIGHT_FILE):
        return None
    with folder.fs.open(folder.path(IN_FLIGHT_FILE), "rb") as file:
        arrays = np.load(file)  # without pickle
        ragged = {name: Ragged(arrays[name], arrays[f"{name}_offsets"]) for name in RAGGED_FIELDS}
        flat = {name: arrays[name] for name in FLAT_FIELDS}
        return Sequences(**flat, **ragged, **json.loads(str(arrays["facts"])))
