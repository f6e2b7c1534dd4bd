"""Checkpoints: what is written, how it is known to be whole, and how it is read on any mesh.

A folder of a run, or of converted weights:

    config.json                        the model's config
    tokenizer.json                     its tokenizer
    conversion.json                    what converted weights were made of
    checkpoints/<step>/params/         parameters, by orbax
                       optimizer/      its state, in a training run
                       progress.json   JSON values that were saved with them
                       manifest.json   SHA-256 of every file of the step

A step is written aside and renamed when it is whole. orbax does not notice a flipped bit, so every file is checked against the
manifest before anything is read.
"""

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict

from ml_mamba_jax import processes, serialize
from ml_mamba_jax.compilation import keep_compiled_programs
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.errors import CheckpointError, InputError
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.quantization import is_quantized, quantize
from ml_mamba_jax.tokenizer import FILE_NAME as TOKENIZER_FILE
from ml_mamba_jax.tokenizer import Tokenizer

CONFIG_FILE = "config.json"
STEPS_FOLDER = "checkpoints"
MANIFEST_FILE = "manifest.json"
PROGRESS_FILE = "progress.json"
CONVERSION_FILE = "conversion.json"
PARAMS = "params"
CHUNK_BYTES, FILE_BYTES = 2**25, 2**27
"""Arrays are written in chunks and files of about these sizes. Writing and reading then take little memory besides the arrays:
with the defaults of orbax, as much again."""


class Loaded(NamedTuple):
    """A model that is ready to use. `tokenizer` is None where the folder has none."""

    model: MLMamba
    params: dict
    tokenizer: Tokenizer | None


def load(folder: str | Path, step: int | None = None) -> Loaded:
    """Model, parameters and tokenizer of a run's folder or of converted weights; `step` as in `load_params`.

    From here on compiled programs are kept for the next process, as `compilation.keep_compiled_programs` says.

    Raises:
        CheckpointError: the folder is none of these, or damaged; names the file.
    """
    folder = Path(folder)
    model = MLMamba(load_config(folder))
    keep_compiled_programs()
    tokenizer = Tokenizer.from_pretrained(folder) if (folder / TOKENIZER_FILE).is_file() else None
    return Loaded(model, load_params(folder, step), tokenizer)


def load_config(folder: str | Path) -> MLMambaConfig:
    """The model's config. Raises CheckpointError for a folder that holds none."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: found no {CONFIG_FILE}, expected the folder of a run or of converted weights; check the path"
        )
    try:
        return serialize.from_json(MLMambaConfig, path.read_text(encoding="utf-8"), str(path))
    except InputError as error:  # names the file already
        raise CheckpointError(str(error)) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error


def load_params(
    folder: str | Path, step: int | None = None, shardings: Any = None, *, without_encoders: bool = False
) -> dict:
    """The parameters, a plain nested dict, on the default device or placed by a tree of `shardings`.

    Those that `quantize` made and `save` wrote come back as they were.

    Args:
        step: which checkpoint; default the newest.
        without_encoders: take a converted run of ML-Mamba whose image encoders were not given; they are then left out.

    Raises:
        CheckpointError: no such checkpoint, a damaged file, parameters that are not those of the folder's config, or
            shardings for quantised ones, which stay on one device.
    """
    folder = Path(folder)
    model = MLMamba(load_config(folder))
    shapes = model.param_shapes()
    if missing := missing_encoders(folder):
        if not without_encoders:
            raise CheckpointError(
                f"{folder}: holds no parameters of the image encoders {', '.join(missing)}; convert again with their weights"
            )
        encoders = {name: tree for name, tree in shapes.pop("vision").items() if name not in missing}
        shapes |= {"vision": encoders} if encoders else {}

    def target(saved: dict) -> dict:
        wanted, places = shapes, shardings
        if is_quantized(saved):
            if shardings is not None:
                raise CheckpointError(
                    f"{folder}: got quantised parameters, expected whole ones to lay over several devices"
                )
            wanted = jax.eval_shape(quantize, shapes)
        if places is None:
            places = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), wanted)
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), wanted, places)

    return restore(folder, newest_step(folder) if step is None else step, {PARAMS: target})[PARAMS]


class ParamsOnDisk(Mapping[str, np.ndarray]):
    """The parameters of the newest checkpoint by path, names joined by "/". Each is read when it is asked for.

    Raises:
        CheckpointError: when it is made: no checkpoint, or a damaged file.
    """

    def __init__(self, folder: Path):
        self._path = (_verify(folder, newest_step(folder)) / PARAMS).absolute()
        with _checkpointer() as checkpointer:
            self.shapes = _by_path(checkpointer.metadata(self._path).item_metadata.tree)

    def __getitem__(self, path: str) -> np.ndarray:
        shape = self.shapes[path]
        item = unflatten_dict({path: jax.ShapeDtypeStruct(shape.shape, shape.dtype)}, sep="/")
        args = unflatten_dict({path: ocp.RestoreArgs(restore_type=np.ndarray)}, sep="/")
        with _tree_checkpointer() as checkpointer:
            restore = ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
            restored = checkpointer.restore(self._path, args=restore)
        return jax.tree.leaves(restored)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def missing_encoders(folder: Path) -> list[str]:
    """Image encoders of the config without parameters: a run of ML-Mamba may be converted without them."""
    path = Path(folder) / CONVERSION_FILE
    if not path.is_file():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["missing_encoders"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: the record of the conversion is damaged; convert again") from error


def write_model(folder: Path, config: MLMambaConfig, tokenizer: Tokenizer | None) -> None:
    """Write what does not change during a run: the config and the tokenizer."""
    serialize.write_text(folder / CONFIG_FILE, serialize.to_json(config))
    if tokenizer is not None:
        tokenizer.save(folder)


def save(
    folder: Path,
    step: int,
    items: Mapping[str, Any],
    progress: Mapping[str, Any] | None = None,
    keep: int = 2,
    spare: Collection[int] = (),
) -> None:
    """Write a checkpoint: trees of arrays by name, and JSON values. Returns when it is on disk, whole and with its manifest.

    All processes of a run call it, and write their parts of the arrays into one folder.

    Older checkpoints beyond `keep`, but those of the steps `spare`, are deleted afterwards, never before.
    """
    final = _step_folder(folder, step)
    aside = final.with_name(f".{step}.partial")
    if processes.is_first():
        for left_over in (*aside.parent.glob(".*.partial"), final):  # of a run that was killed while writing
            shutil.rmtree(left_over, ignore_errors=True)
    processes.barrier("checkpoint: before writing")
    with _tree_checkpointer() as checkpointer:
        for name, tree in items.items():
            chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
            checkpointer.save(
                (aside / name).absolute(),
                args=ocp.args.PyTreeSave(tree, save_args=chunks, ocdbt_target_data_file_size=FILE_BYTES),
            )
    processes.barrier("checkpoint: arrays written")
    if processes.is_first():
        _finish(folder, step, aside, progress, keep, spare)
    processes.barrier("checkpoint: whole")


def _finish(
    folder: Path, step: int, aside: Path, progress: Mapping[str, Any] | None, keep: int, spare: Collection[int]
) -> None:
    """What process 0 does when all have written their arrays."""
    serialize.write_text(aside / PROGRESS_FILE, json.dumps(dict(progress or {}), indent=1) + "\n")
    digests = {str(path.relative_to(aside)): sha256(path) for path in sorted(aside.rglob("*")) if path.is_file()}
    serialize.write_text(aside / MANIFEST_FILE, json.dumps({"sha256": digests}, indent=1) + "\n")
    aside.rename(_step_folder(folder, step))
    for old in set(steps(folder)[:-keep]) - set(spare):
        shutil.rmtree(_step_folder(folder, old))


def restore(folder: Path, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Read items of a checkpoint into trees like `targets` (of `jax.ShapeDtypeStruct` with shardings).

    A target may be a function that makes it of the tree that was saved.

    Raises:
        CheckpointError: no such step, a file that differs from the manifest, or a tree, shape or dtype that is not the target's.
    """
    processes.checked_by_first(lambda: _verify(folder, step))
    step_folder = _step_folder(folder, step)
    restored = {}
    with _checkpointer() as checkpointer:
        for name, target in targets.items():
            path = (step_folder / name).absolute()
            if not path.is_dir():
                raise CheckpointError(f"{step_folder}: found no {name}, expected the checkpoint of a training run")
            saved = checkpointer.metadata(path).item_metadata.tree
            target = target(saved) if callable(target) else target
            _check_like(target, saved, str(step_folder / name))
            restored[name] = checkpointer.restore(path, args=ocp.args.StandardRestore(target))
    return restored


def load_progress(folder: Path, step: int) -> dict[str, Any]:
    """The JSON values that were saved with a checkpoint."""
    return json.loads((_verify(folder, step) / PROGRESS_FILE).read_text(encoding="utf-8"))


def steps(folder: Path) -> list[int]:
    """Steps that were written whole, in order. A step without manifest does not exist."""
    manifests = (Path(folder) / STEPS_FOLDER).glob(f"*/{MANIFEST_FILE}")
    return sorted(int(path.parent.name) for path in manifests if path.parent.name.isdigit())


def newest_step(folder: Path) -> int:
    """Raises CheckpointError for a folder without checkpoints."""
    found = steps(folder)
    if not found:
        raise CheckpointError(
            f"{folder}: found no checkpoint, expected {STEPS_FOLDER}/<step>/{MANIFEST_FILE}; train or convert first"
        )
    return found[-1]


def _step_folder(folder: Path, step: int) -> Path:
    return Path(folder) / STEPS_FOLDER / str(step)


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.StandardCheckpointHandler())


def _tree_checkpointer() -> ocp.Checkpointer:
    """For what the standard one has no options for. Both write and read the same files."""
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(folder: Path, step: int) -> Path:
    """The folder of a step. Raises CheckpointError unless its files are those of its manifest."""
    step_folder = _step_folder(folder, step)
    path = step_folder / MANIFEST_FILE
    if not path.is_file():
        found = ", ".join(map(str, steps(folder))) or "none"
        raise CheckpointError(f"{folder}: found no checkpoint of step {step}, expected one of: {found}")
    advice = f"delete {step_folder} to fall back to an older checkpoint"
    try:
        expected = json.loads(path.read_text(encoding="utf-8"))["sha256"]
        missing = [name for name in expected if not (step_folder / name).is_file()]
        damaged = [
            name for name, digest in expected.items() if name not in missing and sha256(step_folder / name) != digest
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: step {step}: the manifest is damaged; {advice}") from error
    if missing:
        raise CheckpointError(f"{step_folder / missing[0]}: step {step}: the file is missing; {advice}")
    if damaged:
        raise CheckpointError(f"{step_folder / damaged[0]}: step {step}: the file differs from its SHA-256; {advice}")
    return step_folder


def _check_like(target: Any, saved: Any, name: str) -> None:
    """Raise CheckpointError for the differences of two trees: missing and unexpected arrays, shapes, dtypes."""
    want, have = _by_path(target), _by_path(saved)
    problems = [f"{path} is missing" for path in want if path not in have]
    problems += [f"{path} is unexpected" for path in have if path not in want]
    for path in want.keys() & have.keys():
        a, b = want[path], have[path]
        if tuple(a.shape) != tuple(b.shape) or a.dtype != b.dtype:
            problems.append(f"{path} has {b.dtype}{list(b.shape)}, expected {a.dtype}{list(a.shape)}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{name}: got other arrays than the config describes: {'; '.join(problems[:5])}{more}")


def _by_path(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(_key(key) for key in path): leaf for path, leaf in leaves}


def _key(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
