"""Several processes on this machine in place of several hosts.

As a program it is one of them, without a model: `python -m tests.training.hosts OPTIONS` takes steps together with the others, each
of which adds up what all contribute, until it is asked to stop. It says "step 7" when that is done.
"""

import dataclasses
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 240
"""After which nothing is to be expected any more."""


class Hosts:
    """`n` processes of a command, process i with `options[i]` besides; what they print goes to files in `folder`."""

    def __init__(
        self, folder: Path, command: Sequence[str], n: int, n_devices: int, options: Sequence[Sequence[str]] = ()
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        place = [f"--hosts.coordinator-address=127.0.0.1:{free_port()}", f"--hosts.num-processes={n}"]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={n_devices}",
        }
        self.processes = []
        for i in range(n):
            arguments = [*command, *place, f"--hosts.process-id={i}", *(options[i] if options else ())]
            with (folder / f"{i}.out").open("w") as out, (folder / f"{i}.err").open("w") as err:
                process = subprocess.Popen(
                    [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=out, stderr=err
                )
            self.processes.append(process)

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def said(self, i: int) -> str:
        return (self._folder / f"{i}.out").read_text()

    def complained(self, i: int) -> str:
        return (self._folder / f"{i}.err").read_text()

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert all(process.poll() is None for process in self.processes), self._complaints()
            assert time.monotonic() < deadline, self._complaints()
            time.sleep(0.05)

    def ends(self, *which: int) -> list[int]:
        """The exit codes of these processes, of all if none is named."""
        return [self.processes[i].wait(SECONDS) for i in which or range(len(self.processes))]

    def error(self, i: int) -> str:
        """The one line in which a process says why it ended."""
        lines = [line for line in self.complained(i).splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self._complaints()
        return lines[0]

    def _complaints(self) -> str:
        return "\n".join(f"process {i}: {self.complained(i)}" for i in range(len(self.processes)))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def main() -> None:
    import tyro

    from ml_mamba_jax import processes
    from ml_mamba_jax.config import MLMambaConfig
    from ml_mamba_jax.errors import InputError, one_line_errors
    from ml_mamba_jax.training.config import HostsConfig, StageConfig, TrainConfig
    from ml_mamba_jax.training.distributed import joined, meet
    from ml_mamba_jax.training.stop import Stop

    @dataclasses.dataclass(frozen=True)
    class Options:
        hosts: HostsConfig
        step_timeout: float = 1800.0
        seed: int = 0
        sleeps_in_step: int | None = None
        fails_in_step: int | None = None

    options = tyro.cli(Options, default=Options(HostsConfig()))
    numbers = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)[:3]}
    config = TrainConfig("light", MLMambaConfig.named("tiny"), (StageConfig("none"),), **numbers)
    with one_line_errors(), joined(config) as watch, Stop(watch.farewell) as stop:
        meet(config)
        number = 0
        with stop.waits():
            while not stop.requested():
                number += 1
                watch.at(f"reading batch {number}")
                if number == options.sleeps_in_step:
                    time.sleep(SECONDS)
                if number == options.fails_in_step:
                    raise InputError("record r-17: got no picture")
                watch.at(f"taking step {number}")
                (total,) = processes.total(1)
                assert total == watch.n_processes
                print(f"step {number}", file=sys.stderr, flush=True)
        print(f"stopped after step {number}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
