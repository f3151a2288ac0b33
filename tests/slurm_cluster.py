"""A Slurm cluster of one node on this machine's loopback, without cgroups or accounting.

Run as a script, it starts a cluster, runs one command on it, and stops it:
`python tests/slurm_cluster.py squeue`.
"""

import contextlib
import getpass
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

# Debian installs daemons in sbin folders, which are missing from a user's PATH.
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")

# config_overrides: the node has six CPUs, as configured here, whatever the machine has.
# cred_expire: a requeued job waits this many seconds before it starts again.
# SchedulerParameters: the scheduler runs every second or two instead of twice a minute.
_CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={slurmctld_port}
SlurmdPort={slurmd_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=1,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
KillWait=20
NodeName=localhost NodeAddr=127.0.0.1 CPUs=6 State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Returns the names of required programs that this machine lacks."""
    return [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]


@contextlib.contextmanager
def running(folder: pathlib.Path) -> Iterator[dict[str, str]]:
    """Runs a cluster while the context is open; yields the environment for its commands.

    Args:
        folder: an empty folder for its configuration, state, and logs.

    Raises `RuntimeError` if it does not start within a minute.
    """
    configuration = folder / "slurm.conf"
    slurmctld_port, slurmd_port = _free_ports(2)
    text = _CONFIGURATION.format(
        folder=folder,
        user=getpass.getuser(),
        slurmctld_port=slurmctld_port,
        slurmd_port=slurmd_port,
    )
    configuration.write_text(text)
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(configuration)}
    munged = ["munged", "--foreground", "--force", "--num-threads=1"]
    munged += [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    munged += [f"--socket={folder}/munge.socket"]
    with contextlib.ExitStack() as daemons:
        for words in (munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"]):
            daemons.enter_context(_daemon(words, folder, environment))
            if words is munged:
                _wait(lambda: (folder / "munge.socket").exists(), folder)
        _wait(lambda: "idle" in _output(["sinfo", "--noheader"], environment), folder)
        try:
            yield environment
        finally:
            # Jobs outlive slurmd, so they are canceled before it stops.
            _output(["scancel", "--user", getpass.getuser()], environment)
            _wait(lambda: not _output(["squeue", "--noheader"], environment).strip(), folder)


@contextlib.contextmanager
def _daemon(words: list[str], folder: pathlib.Path, environment: dict) -> Iterator[None]:
    with (folder / f"{words[0]}.log").open("wb") as log:
        # In a separate session, Ctrl-C does not reach the daemons. They stop in order, after the
        # jobs.
        process = subprocess.Popen(
            words, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


def _output(words: list[str], environment: dict) -> str:
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    return done.stdout


def _wait(condition, folder: pathlib.Path) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            logs = "".join(path.read_text() for path in sorted(folder.glob("*.log")))
            raise RuntimeError(f"the cluster did not do within a minute what it should:\n{logs}")
        time.sleep(0.1)


if __name__ == "__main__":
    if missing():
        sys.exit(f"error: not found: {', '.join(missing())}; install slurm-wlm and munge")
    # SIGTERM also stops the daemons: `sys.exit` leaves the context.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as name, running(pathlib.Path(name)) as environment:
        sys.exit(subprocess.run(sys.argv[1:], env=environment).returncode)
