"""Start one command of a study: in a folder that nothing else has begun, on GPUs that nobody else has.

    python study/start.py FOLDER [--given FILE ...] [--gpus 8] [--nodes 2] -- python train.py ...

FOLDER.begun keeps what the folder was begun with: the command, and what stood in the files that it was given. The same
again goes on in the folder; anything else moves it aside first (FOLDER.before-1, ...), so that no training goes on from
a checkpoint of other options, and nothing is lost. Snakemake counts GPUs but does not say which: each is taken by a
file lock, which the system releases when the process ends, however it ends. Where there are no GPUs the command runs
on the CPU. Several processes under SLURM are started by srun, which has its own GPUs.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


def begin(folder: Path, command: Sequence[str], given: Sequence[Path]) -> None:
    """Note what a folder is begun with; if it was begun with anything else, move it aside."""
    lines = [shlex.join(command), *(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path}" for path in given)]
    wanted, note = "\n".join(lines) + "\n", folder.with_name(f"{folder.name}.begun")
    if folder.exists() and not (note.exists() and note.read_text() == wanted):
        number = 1
        while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
            number += 1
        folder.rename(aside)
        sys.stderr.write(f"{folder} was begun with other options or data. It is {aside} now.\n")
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(wanted)


def visible_gpus() -> list[str]:
    """The GPUs of this machine or job, by the names that CUDA_VISIBLE_DEVICES takes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(number) for number, _ in enumerate(listed.splitlines())]


def take_gpus(count: int, gpus: Sequence[str], locks: Path) -> list[str]:
    """Wait for as many GPUs as asked for, or all there are if these are fewer, and keep them until the process ends.

    Args:
        count: how many.
        gpus: the names of all.
        locks: folder of the lock files, the same for all who share the GPUs.

    Returns:
        The names of those taken.
    """
    count = min(count, len(gpus))
    locks.mkdir(parents=True, exist_ok=True)
    while True:
        taken: dict[str, int] = {}
        with (locks / "choosing").open("w") as choosing:  # one at a time, so that two who want all do not get half each
            fcntl.flock(choosing, fcntl.LOCK_EX)
            for name in gpus:
                if len(taken) < count:
                    handle = os.open(locks / name.replace("/", "_"), os.O_CREAT | os.O_RDWR)
                    try:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        os.close(handle)
                    else:
                        taken[name] = handle
            if len(taken) == count:
                for handle in taken.values():
                    os.set_inheritable(handle, True)  # the lock outlives exec
                return list(taken)
            for handle in taken.values():
                os.close(handle)
        time.sleep(1)


def main(args: Sequence[str] | None = None) -> None:
    """Begin the folder, take the GPUs, and become the command."""
    words = list(sys.argv[1:] if args is None else args)
    split = words.index("--") if "--" in words else len(words)
    own, command = words[:split], words[split + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--given", type=Path, nargs="*", default=[])
    parser.add_argument("--gpus", type=int, default=0, help="on all nodes; a training gets one process for each")
    parser.add_argument("--nodes", type=int, default=1)
    options = parser.parse_args(own)
    begin(options.folder, command, options.given)
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None and options.gpus > 1:
        each = options.gpus // options.nodes
        command += [f"--trainer.devices={each}", f"--trainer.num_nodes={options.nodes}"]
        shape = [f"--nodes={options.nodes}", f"--ntasks-per-node={each}", f"--gpus-per-node={each}"]
        command = ["srun", *shape, "--kill-on-bad-exit", *command]
    elif options.gpus and (gpus := visible_gpus()):
        # A job of SLURM has GPUs of its own; those of two jobs on one node may have the same names.
        locks = Path(tempfile.gettempdir()) / f"standin-gpus-{os.getuid()}" / (job or "machine")
        taken = take_gpus(options.gpus, gpus, locks)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
        if len(taken) > 1:
            command += [f"--trainer.devices={len(taken)}"]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
