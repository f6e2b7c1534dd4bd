"""Files of PyTorch weights, opened without trust and without copying.

`open_weights` takes a file or the folder of a model, finds out from the content what it is, checks it, and gives every tensor as
a read-only view of the mapped file: memory is needed for what is made from a tensor, not for the tensor. Nothing that stands in a
file is executed. Every failure is one `ConvertError` that names the file and, where there is one, the tensor.
"""

import json
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ml_mamba_jax.convert import torch_files
from ml_mamba_jax.convert.torch_files import MAX_KEY
from ml_mamba_jax.errors import ConvertError

IN_FOLDERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
    "checkpoints/latest-checkpoint.pt",
)
"""What is looked for in the folder of a model; the first that exists is opened."""

INDEX_SUFFIX = ".index.json"
MAX_HEADER = 16 * 2**20
"""Bytes of a safetensors header or of an index. A model of 1000 tensors needs about 0.1 MiB."""

SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading it. `dtype` of bfloat16 is `ml_dtypes.bfloat16`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path


class OpenFile(NamedTuple):
    """One file: its tensors by key, in its order, and the keys of what is no tensor."""

    path: Path
    tensors: dict[str, np.ndarray]
    others: list[str]


class WeightFiles(Mapping[str, np.ndarray]):
    """All tensors of one source by key, in the order of the files, as read-only arrays.

    The keys of nested dictionaries are joined with "/". Arrays are views of mapped files, except those of files that torch wrote
    before version 1.6, which cannot be mapped. After `close`, or at the end of a `with` block, no more tensors can be had; a file
    stays mapped until the last of the arrays that were taken from it is gone.

    Attributes:
        files: the files that hold the tensors.
        others: keys of what the files hold besides tensors: step counters, names.
    """

    def __init__(self, opened: Iterable[OpenFile]):
        self.files: list[Path] = []
        self.others: list[str] = []
        self._tensors: dict[str, np.ndarray] = {}
        self._file_of: dict[str, Path] = {}
        for path, tensors, others in opened:
            for key in tensors.keys() & self._tensors.keys():
                raise ConvertError(
                    f"{path}: got tensor {key!r} again, {self._file_of[key].name} holds it too; expected it once"
                )
            self.files.append(path)
            self.others.extend(others)
            self._tensors |= tensors
            self._file_of |= dict.fromkeys(tensors, path)
        if not self._tensors:
            raise ConvertError(f"{self.files[0]}: found no tensors, expected a dictionary of tensors; check the file")

    def __getitem__(self, key: str) -> np.ndarray:
        """The tensor as a read-only array; of a mapped file, a view of it."""
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def info(self, key: str) -> TensorInfo:
        """Shape, dtype and file of a tensor."""
        array = self._tensors[key]
        return TensorInfo(array.shape, array.dtype, self._file_of[key])

    def aliases(self) -> dict[str, str]:
        """Keys of tied tensors, each with the first key of the same memory: `{"lm_head.weight": "embedding.weight"}`.

        Only torch's format can store a tensor once for two keys. Different views of one storage are different tensors.
        """
        first: dict[tuple, str] = {}
        tied = {}
        for key, array in self._tensors.items():
            memory = (array.ctypes.data, array.shape, array.strides, array.dtype)
            if array.size and first.setdefault(memory, key) != key:
                tied[key] = first[memory]
        return tied

    def close(self) -> None:
        """Let go of the files."""
        self._tensors = {}

    def __enter__(self) -> "WeightFiles":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def open_weights(path: str | Path) -> WeightFiles:
    """Open a file of weights, the index of a sharded model, or the folder of a model (see `IN_FOLDERS`).

    Reads `.safetensors` and what `torch.save` wrote, whatever the files are called.

    Raises:
        ConvertError: no such file, or one that is damaged, malicious or of another format; names the file and the tensor.
    """
    path = Path(path)
    try:
        if path.is_dir():
            path = _in_folder(path)
        return WeightFiles(_open_shards(path) if path.name.endswith(INDEX_SUFFIX) else [_open_file(path)])
    except OSError as error:
        raise ConvertError(f"{error.filename or path}: cannot read the file: {error.strerror}") from error


def _in_folder(folder: Path) -> Path:
    for name in IN_FOLDERS:
        if (folder / name).exists():
            return folder / name
    raise ConvertError(f"{folder}: found no weights, expected one of {', '.join(IN_FOLDERS)}; check the folder")


def _open_file(path: Path) -> OpenFile:
    """Decide by content what a file is, and open it."""
    start = _read(path, 64)
    if torch_files.is_zip(start) or torch_files.is_legacy(start):
        return OpenFile(path, *torch_files.open_torch(path))
    if start[8:9] == b"{":
        return OpenFile(path, _open_safetensors(path), [])
    if not start:
        found = "an empty file"
    elif start.startswith(b"version https://git-lfs"):
        raise ConvertError(f"{path}: got a git-lfs pointer, expected the weights it stands for; run git lfs pull")
    elif start.lstrip()[:1] == b"<":
        found = "a web page"
    else:
        found = f"a file that starts with {start[:16]!r}"
    raise ConvertError(f"{path}: got {found}, expected safetensors or what torch.save writes; download it again")


def _read(path: Path, limit: int) -> bytes:
    """The first bytes of a regular file."""
    if not path.exists():
        raise ConvertError(f"{path}: found no such file; check the path")
    if not path.is_file():
        raise ConvertError(f"{path}: got a {'folder' if path.is_dir() else 'device'}, expected a file of weights")
    with path.open("rb") as file:
        return file.read(limit)


def _open_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Views of the mapped file. The library checks the header, its NumPy reader would copy every tensor."""
    header_size = int.from_bytes(_read(path, 8), "little")
    if header_size > MAX_HEADER:
        raise ConvertError(
            f"{path}: got a header of {header_size} bytes, expected at most {MAX_HEADER}; the file is damaged"
        )
    try:
        from safetensors import safe_open

        with safe_open(path, framework="np"):  # names and sizes fit the file, no tensor overlaps another
            pass
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ImportError as error:
        raise ConvertError(f"{path}: reading it needs safetensors; run pip install 'ml-mamba-jax[convert]'") from error
    except Exception as error:  # SafetensorError is an Exception and no more
        reason = " ".join(str(error).split())[:200]
        raise ConvertError(
            f"{path}: cannot read the file as safetensors ({reason}); it is damaged, download it again"
        ) from error
    header = _parse_json(mapped[8 : 8 + header_size], path)
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise ConvertError(
                f"{path}: tensor {key!r} has dtype {entry['dtype']}, expected one of {', '.join(SAFETENSORS_DTYPES)}"
            )
        offset = 8 + header_size + entry["data_offsets"][0]
        try:
            tensors[key] = np.ndarray(entry["shape"], SAFETENSORS_DTYPES[entry["dtype"]], mapped, offset)
        except ValueError as error:  # more axes than NumPy has, or axes of which one is 0 and the rest are enormous
            raise ConvertError(f"{path}: tensor {key!r} has a shape that cannot be used: {error}") from error
    return tensors


def _open_shards(index: Path) -> list[OpenFile]:
    """The files that an index names. They hold exactly the tensors that it says they hold."""
    shard_of = _read_index(index)
    opened = [_open_file(index.parent / name) for name in sorted(set(shard_of.values()))]
    problems = []
    for path, tensors, _ in opened:
        listed = {key for key, name in shard_of.items() if name == path.name}
        problems += [f"{path.name} lacks tensor {key!r}" for key in sorted(listed - tensors.keys())]
        problems += [f"{path.name} holds tensor {key!r} too" for key in sorted(tensors.keys() - listed)]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConvertError(
            f"{index}: differs from its files: {', '.join(problems[:5])}{more}; the files are not those of this index, "
            "download all of them again"
        )
    return opened


def _read_index(index: Path) -> dict[str, str]:
    """The file name of each tensor, all of them names of existing files beside the index."""
    text = _read(index, MAX_HEADER + 1)
    if len(text) > MAX_HEADER:
        raise ConvertError(f"{index}: got more than {MAX_HEADER} bytes, expected the index of a sharded model")
    content = _parse_json(text, index)
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise ConvertError(f"{index}: found no weight_map, expected the index of a sharded model; check the file")
    for key, name in shard_of.items():
        if not isinstance(name, str):
            raise ConvertError(
                f"{index}: tensor {key!r} has {type(name).__name__} {str(name)[:50]!r} for its file, expected a name"
            )
        _check_shard(index, key, name)
    names = set(shard_of.values())
    numbered = [re.fullmatch(r".*-(\d+)-of-(\d+)\.\w+", name) for name in names]
    if all(numbered):
        expected = {(number, len(names)) for number in range(1, len(names) + 1)}
        if {(int(match[1]), int(match[2])) for match in numbered} != expected:
            raise ConvertError(
                f"{index}: names {len(names)} files ({', '.join(sorted(names)[:5])}), expected each number once, as many "
                "as the names say; the index is damaged"
            )
    return shard_of


def _check_shard(index: Path, key: str, name: str) -> None:
    """A shard stands beside its index: no path leads elsewhere, except a hub cache's links to its own blobs."""
    path = index.parent / name
    if os.path.basename(name) != name or name in ("", ".", "..") or "\\" in name or not name.isprintable():
        raise ConvertError(
            f"{index}: tensor {key!r} is in {name[:200]!r}, expected the name of a file in the same folder"
        )
    if not path.exists():
        raise ConvertError(f"{path}: found no such file, but {index.name} says that it holds tensor {key!r}")
    folder, target = index.parent.resolve(), path.resolve()
    in_cache = folder.parent.name == "snapshots" and target.parent == folder.parents[1] / "blobs"
    if target.parent != folder and not in_cache:
        raise ConvertError(f"{path}: is a link to {target}, expected a file in the folder of {index.name}")


def _parse_json(text: bytes, path: Path) -> Any:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if len(key) > MAX_KEY:
                raise ConvertError(f"{path}: got key {key[:50]!r} of {len(key)} letters, expected at most {MAX_KEY}")
            if key in found:
                raise ConvertError(f"{path}: got {key!r} twice, expected each key once; the file is damaged")
            found[key] = value
        return found

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=distinct)
    except ConvertError:
        raise
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested without end
        raise ConvertError(f"{path}: cannot be read as JSON: {error}") from error
