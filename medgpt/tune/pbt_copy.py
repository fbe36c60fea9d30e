"""Continue a trial from another trial's weights, optimizers and statistics, with new values."""

from dataclasses import replace
from typing import Any

from medgpt.artifacts import FileEntry, Folder, commit, committed
from medgpt.config.tune import Params
from medgpt.rlhf.checkpoint import IN_FLIGHT_FILE
from medgpt.runs import Run
from medgpt.tune.trial_records import StateCopy, TrialRecord, TrialRecords

KL_COEF = "ppo.kl_coef"
METRICS = "metrics.jsonl"


def copy_trial_state(
    records: TrialRecords, record: TrialRecord, params: Params, pointer: dict[str, Any]
) -> TrialRecord:
    """Copy the checkpoint that `pointer` names, and its metrics, to the trial of `record`.

    Learning rates follow from the config; a searched KL coefficient replaces the copied one.
    Rollouts sampled with the old weights are not copied. A copy that the record already names,
    because the trial died after it, is not repeated.

    Raises:
        RuntimeError: the other trial has no checkpoint from that iteration on.
    """
    state_copy = StateCopy(pointer["trial"], pointer["iteration"], params)
    if record.copied and record.copied[-1] == state_copy:
        return record
    run, donor = records.run(record.name), records.run(state_copy.trial)
    iteration = _copy_checkpoint(run, donor, state_copy.iteration, params)
    _copy_metrics(run, donor, iteration)
    return records.write(replace(record, params=params, copied=(*record.copied, state_copy)))


def _copy_checkpoint(run: Run, donor: Run, iteration: int, params: Params) -> int:
    """Copy the oldest kept checkpoint from `iteration` on, and return its iteration."""
    run.checkpoints.remove()
    for step in donor.checkpoint_steps():
        source, target = donor.checkpoint(step), run.checkpoint(step)
        manifest = committed(source, verify=True) if step >= iteration else None
        if manifest is not None and _copy_files(source, target, manifest, params):
            return step
    raise RuntimeError(f"{donor.folder.url} holds no state from iteration {iteration} on")


def _copy_files(source: Folder, target: Folder, manifest: dict[str, Any], params: Params) -> bool:
    """Return whether the source existed until all files were copied."""
    files = [FileEntry(**file) for file in manifest["files"] if file["name"] != IN_FLIGHT_FILE]
    try:
        for file in files:
            path = target.path(file.name)
            source.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            source.fs.cp_file(source.path(file.name), path)
    except FileNotFoundError:
        target.remove()
        return False
    state = manifest["state"]
    if KL_COEF in params:
        state["kl_coef"] = params[KL_COEF]
    commit(target, files, state=state)
    return True


def _copy_metrics(run: Run, donor: Run, iteration: int) -> None:
    """Copy the metrics up to `iteration`; the next attempt comes after all of them."""
    lines = [line for line in donor.metrics() if line["step"] <= iteration]
    run.folder.write_jsonl(METRICS, lines)
    attempts = [run.manifest["attempt"], *(line["attempt"] for line in lines)]
    run.update_manifest(attempt=max(attempts))
