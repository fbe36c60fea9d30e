"""End the processes of the local cluster, and only those: all that it started inherited a mark."""

import sys
from contextlib import suppress

import psutil

MARK = "MEDGPT_LOCAL_CLUSTER"
LEAVE_S = 5  # for raylets and jobs to end by themselves


def processes(folder: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        # others' processes may not be read, and are none of ours
        with suppress(psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            if process.environ().get(MARK) == folder:
                found.append(process)
    return found


def end(folder: str) -> None:
    """Return when none is left."""
    for process in processes(folder):
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(processes(folder), timeout=LEAVE_S)
    while left := processes(folder):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=LEAVE_S)


if __name__ == "__main__":
    if "--check" in sys.argv:  # fails if there are any
        sys.exit(bool(processes(sys.argv[1])))
    end(sys.argv[1])
