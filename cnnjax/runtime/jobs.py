"""Hand a command to jobs of Slurm, or of this machine, by submitit."""

import contextlib
import os
import pathlib
import signal
import subprocess
from typing import Any

from cnnjax.runtime.configuration import parse_literal

# In effect unlimited: a run continues from its checkpoint, so a long one just takes more jobs.
_MOST_REQUEUES = 10_000
# Minutes until submitit ends a job. Local jobs are in effect unlimited: submitit would start a job
# six times at most, and not again if it took more than 30 s to save.
_TIMEOUT_MIN = {"slurm": 24 * 60, "local": 100 * 365 * 24 * 60}
# Chooses the GPUs that a process sees.
_VISIBLE = "CUDA_VISIBLE_DEVICES"


class CommandJob:
    """A job that runs a command and is requeued when its time is over.

    submitit calls it, and calls `checkpoint` at the signal that announces the end of the time.
    """

    def __init__(self, words: list[str], folder: str):
        self.words = words
        self.folder = folder
        self.process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Runs the command, and passes SIGTERM on to it.

        Raises:
            RuntimeError: for an exit code other than 0.
        """
        process = subprocess.Popen(self.words, cwd=self.folder)
        self.process = process
        # `scancel` sends SIGTERM to all processes of a job, which the command takes as one. `kill`
        # sends it to one process, in which submitit would only log it.
        previous = signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
        try:
            code = process.wait()
        finally:
            # Whatever ends the job, such as SIGINT, the command saves and ends with it. If SIGINT
            # has reached the command, too, SIGTERM would end it at once.
            process.send_signal(signal.SIGUSR2)
            process.wait()
            signal.signal(signal.SIGTERM, previous)
        if code:
            raise RuntimeError(f"{' '.join(self.words)} ended with exit code {code}")
        return code

    def checkpoint(self):
        """Lets the command save and end; returns the submission that resumes it."""
        import submitit

        if self.process is not None:
            self.process.send_signal(signal.SIGUSR2)
            # `Popen.wait` would wait for a lock, which its call in `__call__` may hold.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(CommandJob(self.words, self.folder))


def build_executor(folder: pathlib.Path, *, cluster: str, settings: list[str]):
    """Builds the `submitit.AutoExecutor` that submits jobs.

    Args:
        folder: where submitit keeps the jobs' files and output.
        cluster: "slurm" or "local".
        settings: parameters of submitit, such as "timeout_min=60".

    Raises:
        ValueError: for a setting that is not KEY=VALUE or that submitit does not accept.
    """
    import submitit

    parameters: dict[str, Any] = {"name": "cnnjax-sweep", "timeout_min": _TIMEOUT_MIN[cluster]}
    parameters |= dict(_parse_setting(setting) for setting in settings)
    # Since Slurm 22.05, srun, which submitit calls in its batch script, does not inherit this.
    cpus_per_task = parameters.get("slurm_cpus_per_task", parameters.get("cpus_per_task"))
    if cpus_per_task is not None:
        parameters.setdefault("slurm_srun_args", [f"--cpus-per-task={cpus_per_task}"])

    executor = submitit.AutoExecutor(
        folder,
        cluster=cluster,
        slurm_max_num_timeout=_MOST_REQUEUES,
        local_max_num_timeout=_MOST_REQUEUES,
    )
    try:
        executor.update_parameters(**parameters)
    # submitit raises `NameError` for an unknown parameter, and the others for wrong values.
    except (NameError, AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"slurm={settings}: {' '.join(str(error).split())}") from error
    return executor


def submit(executor, words: list[str], count: int) -> list[str]:
    """Submits jobs that each run a command in the current folder.

    Local jobs see the GPUs that this process sees, unless they ask for some ("gpus_per_node=N").

    Args:
        executor: as `build_executor` builds it.
        words: the command and its arguments.
        count: the number of jobs.

    Returns:
        The names of the jobs.
    """
    # submitit hides all GPUs from local jobs that do not ask for some (`start_controller`).
    if executor.cluster == "local" and "gpus_per_node" not in executor.parameters:
        words = _with_own_gpus(words)
    jobs = [executor.submit(CommandJob(words, os.getcwd())) for _ in range(count)]
    return [str(job.job_id) for job in jobs]


def _with_own_gpus(words: list[str]) -> list[str]:
    """Returns a command that sees the GPUs that this process sees, wherever it is started."""
    if _VISIBLE in os.environ:
        return ["env", f"{_VISIBLE}={os.environ[_VISIBLE]}", *words]
    return ["env", "-u", _VISIBLE, *words]


def _parse_setting(setting: str) -> tuple[str, Any]:
    """Parses KEY=VALUE; a value that is no literal of Python is text."""
    key, equals, text = setting.partition("=")
    if not (key and equals):
        raise ValueError(f"slurm={setting!r} is not KEY=VALUE, such as timeout_min=60")
    return key, parse_literal(text)
