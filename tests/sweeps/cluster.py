"""A real SLURM of one node, on this machine: slurmctld, slurmd and munge, as Debian packages them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
MaxArraySize=4
AuthInfo=cred_expire=5  # a job that is queued again waits this long
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=local Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def reason_without_slurm() -> str | None:
    """Why none can be started here."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]
    return f"needs {', '.join(missing)}; type apt-get install slurmctld slurmd slurm-client munge" if missing else None


@contextmanager
def slurm(root: Path) -> Iterator[dict[str, str]]:
    """The environment in which sbatch and the others find the cluster."""
    if subprocess.run(["munge", "-n"], capture_output=True).returncode:
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True)
    for name in ("state", "spool"):
        (root / name).mkdir(parents=True)
    config = root / "slurm.conf"
    config.write_text(
        CONFIG.format(host=socket.gethostname().partition(".")[0], ports=free_ports(), root=root), encoding="utf-8"
    )
    environment = {**os.environ, "SLURM_CONF": str(config)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    daemons = [subprocess.Popen([name, "-D", "-f", str(config)], **quiet) for name in ("slurmctld", "slurmd")]
    try:
        wait_until(lambda: "idle" in tell(["sinfo", "-h", "-o", "%t"], environment), 60)
        yield environment
    finally:
        with suppress(subprocess.SubprocessError):
            subprocess.run(["scancel", "--me", "--signal=KILL", "--full"], env=environment, timeout=10)
        for daemon in daemons:
            daemon.kill()
            daemon.wait()


def tell(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment).stdout


def wait_until(holds: object, seconds: float) -> None:
    """holds: a function; it is asked again and again. Raises TimeoutError."""
    assert callable(holds)
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.2)


def free_ports() -> list[int]:
    with socket.socket() as a, socket.socket() as b:
        for s in (a, b):
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in (a, b)]
