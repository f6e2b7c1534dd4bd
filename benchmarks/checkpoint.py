"""What a checkpoint's manifest costs: python benchmarks/checkpoint.py [--gib N] [--folder DIR]

Saves random float32 arrays as training does, some times with the SHA-256 of all files and as many times without, one after the
other, and checks each against its manifest. Medians of seconds by the clock, and of processor time of all threads. Run it on the
file system that your runs are on (--folder).

Prints a table and writes it, with versions and machine, to --out as JSON.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from ml_mamba_jax import checkpoint, manifest

ARRAY_BYTES = 2**26


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gib", type=float, default=0.5, help="of arrays (default: %(default)s)")
    parser.add_argument("--saves", type=int, default=5, help="of each kind (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the folder for temporary files)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-checkpoint.json"))
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    count = max(1, round(args.gib * 2**30 / ARRAY_BYTES))
    params = {str(i): rng.standard_normal(ARRAY_BYTES // 4, np.float32) for i in range(count)}
    params = jax.device_put(params)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        rows = measure(folder, params, args.saves)
    finally:
        shutil.rmtree(folder)
    gib = count * ARRAY_BYTES / 2**30
    print(f"{gib:.2f} GiB in {count} arrays, {os.cpu_count()} cores, {args.saves} saves of each kind. Medians:")
    for name, (wall, processor) in rows.items():
        print(f"{name:<24}{wall:>8.2f} s{processor:>8.2f} s of processor time")
    (whole, _), (bare, _) = rows["save"], rows["save without SHA-256"]
    print(f"SHA-256 is {1 - bare / whole:.1%} of a save")
    result = {
        "benchmark": "checkpoint",
        "date": date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "GiB": gib,
        "rows": {name: {"wall_s": wall, "processor_s": processor} for name, (wall, processor) in rows.items()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out}")


def measure(folder: Path, params: dict, saves: int) -> dict[str, tuple[float, float]]:
    """Median seconds, by the clock and of the processor."""
    without = mock.patch.object(manifest, "_digests", lambda folder, names: dict.fromkeys(names, ""))
    times: dict[str, list[tuple[float, float]]] = {"save": [], "save without SHA-256": [], "check": []}
    for turn in range(saves + 1):  # the first warms up
        for name in ("save", "save without SHA-256"):
            step = 2 * turn + (name == "save")

            def save(step=step):
                checkpoint.save(folder, step, {"params": params}, keep=1)

            if name == "save":
                times[name].append(timed(save))
                times["check"].append(timed(lambda step=step: checkpoint.verify(folder, step)))
            else:
                with without:
                    times[name].append(timed(save))
    return {name: tuple(map(statistics.median, zip(*of[1:], strict=True))) for name, of in times.items()}


def timed(run: Callable[[], object]) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor


if __name__ == "__main__":
    main()
