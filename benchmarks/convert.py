"""How long a conversion takes, and how much memory: python benchmarks/convert.py [FOLDER] [--model NAME]

Makes a synthetic checkpoint of ML-Mamba in PyTorch's form (random float32 numbers at the real shapes; 12.1 GB for ml-mamba-3b),
unless FOLDER holds one already, converts it, and converts the result back. Peak memory is that of anonymous pages: mapped pages
of the source are the system's to drop. Prints one JSON object.
"""

import argparse
import filecmp
import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.convert import export_torch, import_torch
from ml_mamba_jax.convert.pieces import by_key, torch_shape
from ml_mamba_jax.convert.source import CONFIG_FILE, RUN_CHECKPOINT
from ml_mamba_jax.convert.tables import ml_mamba
from ml_mamba_jax.convert.to_torch import run_config
from ml_mamba_jax.model import MLMamba


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data/synthetic-ml-mamba"))
    parser.add_argument("--model", default="ml-mamba-3b", help="name of the model (default ml-mamba-3b)")
    args = parser.parse_args()
    if not (args.folder / RUN_CHECKPOINT).is_file():
        make_checkpoint(MLMambaConfig.named(args.model), args.folder)
    converted, back = (args.folder.with_name(f"{args.folder.name}-{name}") for name in ("converted", "back"))
    for folder in (converted, back):
        shutil.rmtree(folder, ignore_errors=True)
    shapes = flatten_dict(MLMamba(MLMambaConfig.named(args.model)).param_shapes(), sep="/")
    made = sum(a.size * a.dtype.itemsize for path, a in shapes.items() if not path.startswith("vision/"))
    result = {
        "benchmark": "convert",
        "model": args.model,
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "source_GB": round((args.folder / RUN_CHECKPOINT).stat().st_size / 1e9, 2),
        "parameters_GB": round(made / 1e9, 2),
        "to_jax": measure(lambda: import_torch(args.folder, converted, progress=True), made),
        "to_torch": measure(lambda: export_torch(converted, back, progress=True), made),
        "same_file": filecmp.cmp(args.folder / RUN_CHECKPOINT, back / RUN_CHECKPOINT, shallow=False),
    }
    print(json.dumps(result, indent=1))


def measure(convert: Callable[[], object], n_bytes: int) -> dict[str, float]:
    """Seconds, and the peak of memory, also beyond the bytes of the parameters."""
    with PeakMemory() as memory:
        started = time.perf_counter()
        convert()
        seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 1),
        "peak_anonymous_GB": round(memory.peak / 1e9, 2),
        "beyond_parameters_GiB": round((memory.peak - n_bytes) / 2**30, 2),
    }


class PeakMemory:
    """Largest number of anonymous bytes of this process, looked at every 20 ms (Linux)."""

    def __enter__(self) -> "PeakMemory":
        self.peak, self._running = 0, True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._running = False
        self._thread.join()

    def _watch(self) -> None:
        while self._running:
            status = Path("/proc/self/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            self.peak = max(self.peak, int(line.split()[1]) * 1024)
            time.sleep(0.02)


def make_checkpoint(config: MLMambaConfig, folder: Path) -> None:
    """A run of ML-Mamba with random numbers. They are made in a mapped file, so that memory does not have to hold them."""
    import torch

    shapes = {path: shape.shape for path, shape in flatten_dict(MLMamba(config).param_shapes(), sep="/").items()}
    tensors = {}
    for key, pieces in by_key(ml_mamba(config)).items():
        tensors[key] = torch_shape(pieces, {piece.path: shapes[piece.path] for piece in pieces})
    path = folder / RUN_CHECKPOINT
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".scratch")
    numbers = np.memmap(scratch, np.float32, "w+", shape=sum(map(np.prod, tensors.values())))
    rng, start, arrays = np.random.default_rng(0), 0, {}
    for key, shape in tensors.items():
        view = numbers[start : start + int(np.prod(shape))].reshape(shape)
        start += view.size
        for row in view.reshape(-1, shape[-1]) if view.ndim > 1 else [view]:
            row[...] = 0.02 * rng.standard_normal(row.shape, np.float32)
        if key.endswith("lm_head.weight"):
            view[...] = arrays["model/llm_backbone/backbone.embedding.weight"].numpy()
        arrays[key] = torch.from_numpy(view)
    torch.save(unflatten_dict(arrays, sep="/"), path)
    scratch.unlink()
    (folder / CONFIG_FILE).write_text(json.dumps(run_config(config), indent=2))


if __name__ == "__main__":
    main()
