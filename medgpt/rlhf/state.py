"""Where a PPO run stands, and checkpoints that hold all of it or do not exist."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from medgpt.algos.kl import AdaptiveKL
from medgpt.artifacts import FileEntry, Folder, commit, entries
from medgpt.config.ppo import PPOConfig
from medgpt.rlhf.experience import RunningStats
from medgpt.rlhf.rollout_batch import Ragged, Sequences
from medgpt.runs import Run

IN_FLIGHT = "in-flight.npz"
RAGGED = ("prompts", "responses")
FLAT = ("index", "logprobs", "finished")


@dataclass
class State:
    """All that decides the iterations to come, beside the models. Randomness is a function of the
    seed and the iteration, and so is the order of the prompts: there is nothing else to keep."""

    iteration: int = 0
    """Iterations done; the next one's prompts follow from it, and the actor's weight version."""
    kl_coef: float = 0.0
    score_stats: RunningStats = field(default_factory=RunningStats)
    time_s: float = 0.0

    @staticmethod
    def read(tree: dict[str, Any]) -> "State":
        return State(**{**tree, "score_stats": RunningStats(*tree["score_stats"])})


def next_kl_coef(kl_coef: float, mean_kl: float, num_sequences: int, config: PPOConfig) -> float:
    """The coefficient of the next iteration."""
    if config.kl_controller == "fixed" or not num_sequences:
        return kl_coef
    controller = AdaptiveKL(kl_coef, config.kl_target, config.kl_horizon)
    controller.update(mean_kl, num_sequences)
    return controller.coef


class Checkpoint:
    """One that is being written. The manifest, written last, makes it exist.

    Args:
        parts: by subfolder, what waits for the files its writers wrote.
        keep: newest checkpoints that stay, this one included.
    """

    def __init__(
        self,
        run: Run,
        state: State,
        parts: dict[str, Callable[[], list[FileEntry]]],
        *,
        keep: int,
    ) -> None:
        self.run, self.parts, self.keep = run, parts, keep
        self.tree = asdict(state) | {"score_stats": list(state.score_stats)}
        self.iteration = state.iteration
        self.folder = run.checkpoint(state.iteration)

    def finish(self, *, in_flight: Sequences | None) -> None:
        """Wait for all files and commit them; older checkpoints are removed."""
        files = [
            FileEntry(f"{name}/{file.name}", file.size, file.xxh128)
            for name, written in self.parts.items()
            for file in written()
        ]
        if in_flight is not None:
            files += write_sequences(self.folder, in_flight)
        commit(self.folder, files, state=self.tree)
        self.run.prune_checkpoints(newest=self.iteration, keep=self.keep, best_step=None)


def newest(run: Run) -> tuple[Folder, State] | None:
    """The newest complete checkpoint."""
    found = run.newest_checkpoint()
    return None if found is None else (found[0], State.read(found[1]["state"]))


def write_sequences(folder: Folder, sequences: Sequences) -> list[FileEntry]:
    """Rollouts that were sampled and not learnt when the run stopped."""
    arrays: dict[str, Any] = {name: getattr(sequences, name) for name in FLAT}
    for name in RAGGED:
        ragged = getattr(sequences, name)
        arrays |= {name: ragged.values, f"{name}_offsets": ragged.offsets}
    facts = {"sample_ids": sequences.sample_ids, "weight_version": sequences.weight_version}
    with folder.staging() as directory:
        np.savez(directory / IN_FLIGHT, facts=np.array(json.dumps(facts)), **arrays)
        return entries(directory, [IN_FLIGHT])


def read_sequences(folder: Folder) -> Sequences | None:
    if not folder.exists(IN_FLIGHT):
        return None
    with folder.fs.open(folder.path(IN_FLIGHT), "rb") as file:
        arrays = np.load(file)  # without pickle, as always
        ragged = {name: Ragged(arrays[name], arrays[f"{name}_offsets"]) for name in RAGGED}
        flat = {name: arrays[name] for name in FLAT}
        return Sequences(**flat, **ragged, **json.loads(str(arrays["facts"])))
