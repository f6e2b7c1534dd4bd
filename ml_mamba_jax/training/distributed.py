"""How the processes of a run on several hosts find each other, before JAX is used for anything else.

A cluster that JAX knows tells each process its place: TPU pods, SLURM, Open MPI. Elsewhere three options say it, or the variables
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Where nothing says that there are others, a run is one process.
"""

import collections
import contextlib
import dataclasses
import glob
import importlib.util
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import jax

# The key-value store of the coordinator has no public name yet; orbax takes it from here too.
from jax._src import distributed as jax_distributed

from ml_mamba_jax import processes, serialize
from ml_mamba_jax.errors import InputError, WorkerError, one_line_errors
from ml_mamba_jax.training.config import HostsConfig, TrainConfig
from ml_mamba_jax.training.watch import Watch

PLACE = ("coordinator_address", "num_processes", "process_id")
"""Fields of HostsConfig, and in capitals behind JAX_ the variables, that say where a process stands."""


@contextlib.contextmanager
def joined(config: TrainConfig) -> Iterator[Watch]:
    """Inside the block the processes of the run know each other, and the watch that it gives ends them if one is missing.

    Of several processes one that raises an error there ends at once, and the others soon after.

    Raises:
        InputError: options or variables that are incomplete or contradict each other.
        WorkerError: the processes did not find each other.
    """
    given = place_of(config.hosts)
    watch = Watch(config.hosts.peer_timeout, config.step_timeout)
    if not given and config.hosts.cluster is None and not cluster_announced():
        yield watch
        return
    _start(config.hosts, given, watch)
    if watch.n_processes == 1:
        yield watch
        return
    watch.begin()
    try:
        with one_line_errors():
            yield watch
            watch.at("waiting for the others to end")
            processes.barrier("end")
    except BaseException as error:
        watch.leave(error)
    watch.close()
    jax.distributed.shutdown()


def place_of(hosts: HostsConfig) -> dict[str, str | int]:
    """Address of the coordinator, number of processes and id of this one; empty where neither options nor variables say so.

    Raises:
        InputError: some of them only, or an id that is none of so many.
    """
    found: dict[str, str | int] = {}
    for name in PLACE:
        value, variable = getattr(hosts, name), f"JAX_{name.upper()}"
        if value is None and (text := os.environ.get(variable)):
            value = text
            if name != PLACE[0]:
                if not text.isdecimal():
                    raise InputError(f"{variable}: got {text!r}, expected a number")
                value = int(text)
        if value is not None:
            found[name] = value
    if hosts.cluster is not None or not found:
        return found
    if missing := [name for name in PLACE if name not in found]:
        raise InputError(
            f"hosts: got {', '.join(found)} without {', '.join(missing)}, expected all three; pass "
            + " ".join(f"--hosts.{name.replace('_', '-')}" for name in missing)
            + ", or set "
            + ", ".join(f"JAX_{name.upper()}" for name in missing)
        )
    host, _, port = str(found[PLACE[0]]).rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"hosts.coordinator_address: got {found[PLACE[0]]!r}, expected HOST:PORT of process 0")
    if not 0 <= found["process_id"] < found["num_processes"]:
        raise InputError(
            f"hosts.process_id: got {found['process_id']} of {found['num_processes']} processes, expected 0 to "
            f"{int(found['num_processes']) - 1}"
        )
    return found


def cluster_announced() -> bool:
    """Whether this process was started as one of several by what JAX can ask, or on a TPU, whose pods say so only when asked."""
    variables = os.environ
    if {"SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST"} <= variables.keys():
        return int(variables.get("SLURM_NTASKS", 1)) > 1
    if "OMPI_COMM_WORLD_SIZE" in variables:
        return int(variables["OMPI_COMM_WORLD_SIZE"]) > 1
    on_tpu = importlib.util.find_spec("libtpu") is not None and bool(
        glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    )
    workers = variables.get("TPU_PROCESS_ADDRESSES") or variables.get("TPU_WORKER_HOSTNAMES")
    return on_tpu and ("," in workers if workers else "TPU_SKIP_MDS_QUERY" not in variables)


def _start(hosts: HostsConfig, given: dict[str, str | int], watch: Watch) -> None:
    """Returns when all processes have come, or where JAX knows of no others."""
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    if given.get("process_id") == 0:
        _check_can_listen(str(given["coordinator_address"]))
        print(f"waiting for {given['num_processes']} processes ...", flush=True)
    watch.expect(jax_distributed.global_state)
    try:
        jax.distributed.initialize(
            **given,
            cluster_detection_method="deactivate" if given and hosts.cluster is None else hosts.cluster,
            initialization_timeout=round(hosts.start_timeout),
            # Behind our own limit: it ends a process without a word about which one is missing.
            heartbeat_timeout_seconds=round(2 * hosts.peer_timeout) + 30,
        )
    except ValueError as error:
        if given or hosts.cluster is not None:
            raise InputError(f"hosts: {error}") from error
    except RuntimeError as error:
        raise WorkerError(f"hosts: the processes did not find each other: {str(error).splitlines()[0]}") from error


def _check_can_listen(address: str) -> None:
    """Raise InputError for a port that is taken: JAX's coordinator crashes on one."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    port = int(address.rsplit(":", 1)[1])
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
    except OSError as error:
        raise InputError(
            f"hosts.coordinator_address: got port {port}, on which process 0 cannot listen ({error.strerror}); choose a free one"
        ) from error


def meet(config: TrainConfig) -> None:
    """What several processes do first when JAX has its devices: from here on only process 0 prints.

    Raises:
        InputError: in all processes, for a recipe or a number of devices that is not that of process 0.
    """
    if not processes.is_first():
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what libraries in C print, too
    devices = collections.Counter(device.process_index for device in jax.devices())
    if other := [i for i, n in devices.items() if n != devices[0]]:
        raise InputError(f"process {other[0]}: got {devices[other[0]]} devices, expected {devices[0]} as process 0 has")
    own = dataclasses.replace(config, hosts=HostsConfig())
    recipes = [serialize.from_json(TrainConfig, text, "recipe") for text in processes.gather(serialize.to_json(own))]
    for i, recipe in enumerate(recipes):
        if changed := serialize.differences(recipes[0], recipe):
            raise InputError(
                f"process {i}: got another recipe than process 0 ({'; '.join(changed)}); start all with the same options"
            )


def check_same(facts: dict[str, Any]) -> None:
    """Raise InputError, in all processes, where one has found something else on its disk than process 0."""
    everywhere = processes.gather(facts)
    for i, theirs in enumerate(everywhere):
        if changed := [f"{k}: {everywhere[0][k]} -> {v}" for k, v in theirs.items() if v != everywhere[0][k]]:
            raise InputError(
                f"process {i}: found something else than process 0 ({'; '.join(changed)}); let all see the same data and the "
                "same folder of runs"
            )
