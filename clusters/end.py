"""Ends the processes of the local cluster, and only those, by an inherited environment variable."""

import sys
from contextlib import suppress

import psutil

ENVIRONMENT_MARK = "MEDGPT_LOCAL_CLUSTER"
TERMINATE_TIMEOUT_S = 5  # time for raylets and jobs to end by themselves


def cluster_processes(folder: str) -> list[psutil.Process]:
    processes = []
    for process in psutil.process_iter():
        # processes of other users are not readable, and not ours
        with suppress(psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            if process.environ().get(ENVIRONMENT_MARK) == folder:
                processes.append(process)
    return processes


def end_cluster(folder: str) -> None:
    """End all processes of the cluster and return when none is left."""
    for process in cluster_processes(folder):
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(cluster_processes(folder), timeout=TERMINATE_TIMEOUT_S)
    while remaining := cluster_processes(folder):
        for process in remaining:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(remaining, timeout=TERMINATE_TIMEOUT_S)


if __name__ == "__main__":
    if "--check" in sys.argv:  # exit with status 1 if there are any
        sys.exit(bool(cluster_processes(sys.argv[1])))
    end_cluster(sys.argv[1])
