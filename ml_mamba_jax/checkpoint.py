"""Checkpoints: what is written, how it is known to be whole, and how it is read on any mesh.

A folder of a run, or of converted weights:

    config.json                        the model's config
    tokenizer.json                     its tokenizer
    conversion.json                    what converted weights were made of
    checkpoints/<step>/params/         parameters, by orbax
                       optimizer/      its state, in a training run
                       progress.json   JSON values that were saved with them
                       manifest.json   the step, and SHA-256 of every file of it

A step is written aside and renamed when it is whole. orbax does not notice a flipped bit, so every file is checked against the
manifest before anything is read: that all are there, no others, and as they were written.
"""

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict

from ml_mamba_jax import manifest, processes, serialize
from ml_mamba_jax.compilation import keep_compiled_programs
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.errors import CheckpointError, InputError
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.quantization import is_quantized, quantize
from ml_mamba_jax.tokenizer import FILE_NAME as TOKENIZER_FILE
from ml_mamba_jax.tokenizer import Tokenizer

CONFIG_FILE = "config.json"
STEPS_FOLDER = "checkpoints"
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
        self._path = (verify(folder, newest_step(folder)) / PARAMS).absolute()
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

    Raises:
        CheckpointError: it cannot be written, for example because the disk is full; those from before are as they were.
    """
    final, aside = _step_folder(folder, step), _aside(folder, step)
    if processes.is_first():
        for left_over in aside.parent.glob(".*.partial"):  # of a run that was killed while writing or deleting
            shutil.rmtree(left_over, ignore_errors=True)
    processes.barrier("checkpoint: before writing")
    try:
        _write_arrays(aside, items)
        processes.barrier("checkpoint: arrays written")
        if processes.is_first():
            serialize.write_text(aside / PROGRESS_FILE, json.dumps(dict(progress or {}), indent=1) + "\n")
            manifest.write(aside, step)
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            serialize.sync(final.parent)
    except (OSError, ValueError) as error:  # orbax also raises the latter, with what the file system says at its end
        shutil.rmtree(aside, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error).rsplit(": ", 1)[-1][:200]
        raise CheckpointError(
            f"{final}: cannot be written: {reason}; checkpoints from before are as they were ({_listed(folder)}): see to it and "
            "go on with --resume"
        ) from error
    if processes.is_first():
        for old in set(steps(folder)[:-keep]) - set(spare):
            shutil.rmtree(_step_folder(folder, old).rename(_aside(folder, old)))  # renamed, for half of a step is none
    processes.barrier("checkpoint: whole")


def _write_arrays(aside: Path, items: Mapping[str, Any]) -> None:
    with _tree_checkpointer() as checkpointer:
        for name, tree in items.items():
            chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
            checkpointer.save(
                (aside / name).absolute(),
                args=ocp.args.PyTreeSave(tree, save_args=chunks, ocdbt_target_data_file_size=FILE_BYTES),
            )


def restore(folder: Path, step: int, targets: Mapping[str, Any], *, verified: bool = False) -> dict[str, Any]:
    """Read items of a checkpoint into trees like `targets` (of `jax.ShapeDtypeStruct` with shardings).

    A target may be a function that makes it of the tree that was saved. `verified`: its files were checked just before.

    Raises:
        CheckpointError: no such step, a file that differs from the manifest, or a tree, shape or dtype that is not the target's.
    """
    if not verified:
        processes.checked_by_first(lambda: verify(folder, step))
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
    return json.loads((verify(folder, step, [PROGRESS_FILE]) / PROGRESS_FILE).read_text(encoding="utf-8"))


def steps(folder: Path) -> list[int]:
    """Steps that were written whole, in order. Whether they still are, `verify` says."""
    return sorted(int(path.name) for path in (Path(folder) / STEPS_FOLDER).glob("*") if path.name.isdigit())


def newest_step(folder: Path) -> int:
    """Raises CheckpointError for a folder without checkpoints."""
    found = steps(folder)
    if not found:
        raise CheckpointError(
            f"{folder}: found no checkpoint, expected a folder {STEPS_FOLDER}/<step>; train or convert first"
        )
    return found[-1]


def _step_folder(folder: Path, step: int) -> Path:
    return Path(folder) / STEPS_FOLDER / str(step)


def _aside(folder: Path, step: int) -> Path:
    """Where a step is while it is written or deleted."""
    return _step_folder(folder, step).with_name(f".{step}.partial")


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.StandardCheckpointHandler())


def _tree_checkpointer() -> ocp.Checkpointer:
    """For what the standard one has no options for. Both write and read the same files."""
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def verify(folder: Path, step: int, names: Iterable[str] | None = None) -> Path:
    """The folder of a step, whose files are those of its manifest; or only the files `names`, if the rest is known to be.

    Raises:
        CheckpointError: no such step; a file that is missing, does not belong there, or differs from what was written. Names it.
    """
    step_folder = _step_folder(folder, step)
    if not step_folder.is_dir():
        raise CheckpointError(f"{folder}: found no checkpoint of step {step}, expected one of: {_listed(folder)}")
    try:
        manifest.check(step_folder, step, names)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; the checkpoint is damaged, take another one ({_listed(folder)})") from error
    return step_folder


def set_aside(folder: Path, step: int) -> Path:
    """Rename a damaged checkpoint, so that it counts as none; returns its new place."""
    path = _step_folder(folder, step)
    place = path.with_name(f"{step}.damaged")
    shutil.rmtree(place, ignore_errors=True)
    return path.rename(place)


def _listed(folder: Path) -> str:
    return ", ".join(map(str, steps(folder))) or "none"


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
