"""Processes that find each other, or say why not; that miss one of them; and that stop together."""

import signal
import socket
import time

import pytest

from ml_mamba_jax.errors import InputError
from ml_mamba_jax.training.config import HostsConfig
from ml_mamba_jax.training.distributed import cluster_announced, place_of
from tests.training.hosts import Hosts, free_port

LIGHT = ["-m", "tests.training.hosts", "--hosts.peer-timeout=5"]
PEER_TIMEOUT, BEYOND = 5, 15
"""Seconds without a sign of life, and those that all may take in addition until they have ended."""


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)


def test_options_and_variables_say_where_a_process_stands(monkeypatch):
    assert place_of(HostsConfig()) == {}
    expected = {"coordinator_address": "a:1", "num_processes": 3, "process_id": 2}
    assert place_of(HostsConfig("a:1", 3, 2)) == expected
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    assert place_of(HostsConfig(process_id=2)) == expected, "an option goes before a variable"
    monkeypatch.setenv("JAX_PROCESS_ID", "two")
    with pytest.raises(InputError, match="JAX_PROCESS_ID: got 'two', expected a number"):
        place_of(HostsConfig())


@pytest.mark.parametrize(
    "hosts, message",
    [
        (
            HostsConfig("a:1", 2),
            "got coordinator_address, num_processes without process_id, .* --hosts.process-id, or set JAX_",
        ),
        (HostsConfig("a", 2, 0), "coordinator_address: got 'a', expected HOST:PORT of process 0"),
        (HostsConfig("a:1", 2, 2), "process_id: got 2 of 2 processes, expected 0 to 1"),
    ],
)
def test_incomplete_places_are_refused(hosts, message):
    with pytest.raises(InputError, match=message):
        place_of(hosts)


@pytest.mark.parametrize(
    "variables, announced",
    [
        ({}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}, False),  # in a batch script, without srun
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False),  # no TPU here
    ],
)
def test_clusters_are_recognised(monkeypatch, variables, announced):
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cluster_announced() == announced


@pytest.mark.parametrize(
    "sent, victim",
    [
        ("SIGKILL", 1),
        ("SIGSTOP", 1),
        pytest.param("SIGKILL", 0, marks=pytest.mark.full),
        pytest.param("SIGSTOP", 0, marks=pytest.mark.full),
    ],
)
def test_when_a_process_is_dead_or_stands_still_the_other_ends(tmp_path, sent, victim):
    with Hosts(tmp_path, LIGHT, n=2, n_devices=1) as hosts:
        hosts.wait_until(lambda: "step 3\n" in hosts.complained(0) and "step 3\n" in hosts.complained(1))
        hosts.processes[victim].send_signal(getattr(signal, sent))
        began = time.monotonic()
        assert hosts.ends(1 - victim) == [5]
        assert time.monotonic() - began < PEER_TIMEOUT + BEYOND
        assert hosts.error(1 - victim).startswith(f"error: process {victim} is missing: got no ")
        assert "in total\n" in hosts.complained(1 - victim), "the stack of what it was doing"
        if sent == "SIGSTOP":  # when it wakes up it sees that it is alone
            hosts.processes[victim].send_signal(signal.SIGCONT)
            assert hosts.ends(victim) == [5]
            assert "stood still for" in hosts.error(victim) or "process 0 is missing" in hosts.error(victim)


def test_a_process_that_does_not_go_on_is_named(tmp_path):
    command = [*LIGHT, "--step-timeout=3"]
    with Hosts(tmp_path, command, n=2, n_devices=1, options=[[], ["--sleeps-in-step=4"]]) as hosts:
        assert hosts.ends() == [5, 5]
        for i, doing in enumerate(("in total\n", "in main\n")):
            assert hosts.error(i).startswith(
                "error: process 1 is stuck: nothing went on for 3 s while reading batch 4; "
            )
            assert doing in hosts.complained(i)


@pytest.mark.full
def test_an_error_in_one_process_ends_all(tmp_path):
    with Hosts(tmp_path, LIGHT, n=3, n_devices=1, options=[[], ["--fails-in-step=4"], []]) as hosts:
        assert hosts.ends() == [5, 2, 5]
        assert hosts.error(1) == "error: record r-17: got no picture"
        for i in (0, 2):
            assert hosts.error(i).startswith("error: process 1 ended: record r-17: got no picture; ")


@pytest.mark.parametrize("to", [[1], pytest.param([0, 1], marks=pytest.mark.full)], ids=["one", "both"])
def test_asked_to_stop_all_stop_after_the_same_step(tmp_path, to):
    with Hosts(tmp_path, LIGHT, n=2, n_devices=1) as hosts:
        hosts.wait_until(lambda: "step 3\n" in hosts.complained(1))
        for i in to:
            hosts.processes[i].send_signal(signal.SIGTERM)
        assert hosts.ends() == [0, 0]
        ends = [hosts.complained(i).splitlines()[-1] for i in range(2)]
        assert ends[0] == ends[1] and ends[0].startswith("stopped after step ")


def test_other_recipes_are_refused_with_both_values(tmp_path):
    with Hosts(tmp_path, LIGHT, n=2, n_devices=1, options=[[], ["--seed=1"]]) as hosts:
        assert hosts.ends() == [2, 2]
        for i in range(2):
            assert hosts.complained(i).splitlines() == [
                "error: process 1: got another recipe than process 0 (seed: 0 -> 1); start all with the same options"
            ]


@pytest.mark.full
def test_nobody_is_waited_for_longer_than_asked_for(tmp_path):
    alone = [*LIGHT, "--hosts.start-timeout=2"]
    for i, message in ((0, "hosts: got not all of 2 processes in "), (1, "hosts: got no answer from 127.0.0.1:")):
        with Hosts(tmp_path / str(i), alone, n=2, n_devices=1) as hosts:
            hosts.processes[1 - i].kill()
            began = time.monotonic()
            assert hosts.ends(i) == [5]
            assert time.monotonic() - began < 2 + BEYOND
            assert hosts.error(i).startswith(f"error: {message}")


def test_a_port_that_is_taken_is_refused(monkeypatch):
    from ml_mamba_jax.training import distributed

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=f"got port {port}, on which process 0 cannot listen"):
            distributed._check_can_listen(f"127.0.0.1:{port}")
    distributed._check_can_listen(f"127.0.0.1:{free_port()}")
