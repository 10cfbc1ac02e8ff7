"""A SLURM of two nodes on this machine, in namespaces of its own: the real slurmctld, slurmd and munged.

Debian's packages are installed when they are missing, which takes root and a package mirror. Everything the cluster
writes is below one folder; nothing outlives it, for it ends with the namespace's first process.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.isolation import QUIET_LOOPBACK, inside, why_not_isolated

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip")
PACKAGES = ("slurm-wlm", "munge", "iproute2")
# Two nodes are two slurmd on this machine. Without cred_expire a requeued job waits two minutes, without
# sched_interval half a minute more. What its GPUs are is in gres.conf.
_CONF = """
ClusterName=t
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=20
GresTypes=gpu
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[16820-16821] CPUs=4 RealMemory=8000 Gres=gpu:4 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
"""


def why_no_slurm() -> str | None:
    """Why no cluster can be had here, or None; installs SLURM where only that is missing."""
    reason = why_not_isolated()
    if reason is not None or all(shutil.which(program) for program in PROGRAMS):
        return reason
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
    for command in (["apt-get", "update", "-qq"], install):
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=300, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"SLURM is not installed, and {' '.join(command)} failed: {error}"
        if done.returncode:
            return f"SLURM is not installed, and {' '.join(command)} failed: {done.stderr.strip()[-300:]}"
    return None


class SlurmCluster:
    """Starts on entering, ends on leaving; `run` runs a command on its login node.

    Args:
        folder: what the daemons write.
        home: where commands run and jobs are submitted.
    """

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self.home = folder, home
        self._environment = {**os.environ, **QUIET_LOOPBACK, "SLURM_CONF": str(folder / "slurm.conf")}
        del self._environment["MASTER_ADDR"]  # the batch script's to find
        self._environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._first: subprocess.Popen | None = None

    def __enter__(self) -> SlurmCluster:
        for name in ("state", "spool-n0", "spool-n1"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self.folder.chmod(0o755)  # munged insists that others cannot write here
        host = socket.gethostname().split(".")[0]
        (self.folder / "slurm.conf").write_text(_CONF.format(host=host, folder=self.folder), encoding="utf-8")
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + "127.0.0.1 n0 n1\n", encoding="utf-8")
        devices = ("null", "zero", "random", "urandom")  # what a GPU is to SLURM: a device file
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File=/dev/{name}\n" for name in devices), encoding="utf-8")
        self._first = subprocess.Popen(inside(["sleep", "infinity"]), stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            self._start_daemons()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._first is not None
        self._first.kill()  # everything inside goes with it
        self._first.wait(timeout=30)

    def run(self, argv: Sequence[str | os.PathLike[str]], *, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """Run a command inside and wait for it."""
        # Entering a mount namespace leaves the working folder: env goes back to it.
        command = [*self._enter(), "env", f"--chdir={self.home}", *(os.fspath(argument) for argument in argv)]
        return subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)

    def sbatch(self, *arguments: str) -> str:
        """Submit, and return the job's id."""
        done = self.run(["sbatch", "--parsable", *arguments])
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().split(";")[0]

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says, of the first task of an array."""
        text = self.run(["scontrol", "show", "job", "-o", job_id]).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", text.splitlines()[0])) if text else {}

    def states(self, job_id: str) -> list[str]:
        """The state of a job, or of each task of an array."""
        text = self.run(["scontrol", "show", "job", "-o", job_id]).stdout
        return re.findall(r"JobState=(\S+)", text)

    def wait(self, job_id: str, *, timeout: float, until: Sequence[str] = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")) -> list[str]:
        """Wait until every task of the job is in one of the states; returns them."""
        give_up_at = time.monotonic() + timeout
        while True:
            states = self.states(job_id)
            if states and all(state in until for state in states):
                return states
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"job {job_id} is {states} after {timeout} s\n{self.log()}")
            time.sleep(0.5)

    def output(self, job_id: str) -> str:
        """What a job's tasks and batch script printed."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.home.glob(f"slurm/logs/*-{job_id}[._]*")))

    def log(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in sorted(self.folder.glob("*.log")))

    def _enter(self) -> list[str]:
        """The command before a command that takes it inside."""
        assert self._first is not None
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children")
        give_up_at = time.monotonic() + 10
        while not (found := children.read_text().split()):  # unshare has not forked yet
            assert self._first.poll() is None and time.monotonic() < give_up_at
            time.sleep(0.02)
        return ["nsenter", "-t", found[0], "--net", "--mount", "--pid", "--"]

    def _start_daemons(self) -> None:
        give_up_at = time.monotonic() + 30
        while "192.0.2.77" not in self.run(["ip", "addr", "show", "lo"]).stdout:  # isolation's own set-up comes first
            assert time.monotonic() < give_up_at
            time.sleep(0.05)
        munge = [
            f"--{what}={self.folder}/munge.{suffix}"
            for what, suffix in (("key-file", "key"), ("socket", "sock"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))
        ]
        name_nodes = ["mount", "--bind", f"{self.folder}/hosts", "/etc/hosts"]
        for command in (
            name_nodes,
            ["munged", "--force", *munge],
            ["slurmctld", "-c"],
            ["slurmd", "-N", "n0", "-c"],
            ["slurmd", "-N", "n1", "-c"],
        ):
            done = self.run(command)
            assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        while self.run(["sinfo", "-h", "-o", "%T"]).stdout.split() != ["idle"]:
            assert time.monotonic() < give_up_at, self.log()
            time.sleep(0.2)
