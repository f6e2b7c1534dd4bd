"""Files of `torch.save`, opened without trust: the one place of this repository that calls `torch.load`.

Such a file is a pickle that describes tensors, and their bytes: in a zip archive, whose bytes are mapped, or before torch 1.6 one
after the other, which have to be read. `weights_only` keeps torch from executing what a pickle asks for, since torch 2.6 without
known exceptions. It does not keep a file of some hundred bytes from filling the memory: with compressed entries, with tensors that
repeat one number, or with constructors that are safe but large. So before torch sees a file,

- `_check_archive` reads the directory of the archive: plain entries, one after the other, each name once;
- `_check_pickle` reads the pickle's instructions without executing them: only those of plain tensors, not too many;

and afterwards every tensor is compared with what the file holds of it.
"""

import io
import os
import pickletools
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ml_mamba_jax.errors import ConvertError

MIN_TORCH = (2, 6)
"""Before, a file could execute code even under `weights_only` (CVE-2025-32434)."""

MAX_LEGACY_SIZE = 2 * 2**30
MAX_DIRECTORY = 16 * 2**20
MAX_PICKLE = 16 * 2**20
MAX_INSTRUCTIONS = 500_000
"""About 35 describe a tensor."""
MAX_WORK = 5_000_000
"""Steps that they may take. An object that is used many times could take any number."""
MAX_DEPTH = 16
MAX_KEYS = 50_000
MAX_KEY = 1000

ALLOWED = (
    r"collections OrderedDict|torch (Size|device|float64|float32|float16|bfloat16)"
    r"|torch(\.cuda)? (?!Untyped|Typed)\w+Storage|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
)
"""All that a pickle of plain tensors names."""

PICKLE_MARKS = (pickletools.markobject, pickletools.stackslice)
PICKLE_CHANGES = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD")
"""Instructions that change the lowest object that they take; the others make a new one."""

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
PLAIN = "expected a dictionary of plain tensors; save its state_dict alone"


def is_zip(start: bytes) -> bool:
    """Whether these are the first bytes of a zip archive."""
    return start.startswith(b"PK\x03\x04")


def is_legacy(start: bytes) -> bool:
    """Whether these are the first bytes of a binary pickle: what torch wrote before version 1.6, or no weights at all."""
    return start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")


def open_torch(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Tensors by their keys, joined with "/", as read-only arrays, and the keys of what is no tensor.

    Raises:
        ConvertError: names the file and, where there is one, the tensor.
        OSError: the file cannot be opened.
    """
    if path.suffix == ".safetensors":  # torch.load decides by the name
        raise ConvertError(
            f"{path}: got a file of torch.save named .safetensors, expected safetensors; rename it to .pt"
        )
    try:
        with path.open("rb") as file:
            size, mapped = os.fstat(file.fileno()).st_size, is_zip(file.read(4))
            if mapped:
                entries = _check_archive(file, path)
            else:
                _check_legacy(file, size, path)
        content, storages = _load(path, mapped, size)
        tensors, others = _flatten(content, path)
        if mapped:
            _check_storages(tensors, storages, entries, path)
        return {key: _as_array(tensor, key, path) for key, tensor in tensors.items()}, others
    except (ConvertError, OSError):
        raise
    except Exception as error:  # torch and zipfile raise whatever they stumble over
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConvertError(f"{path}: cannot read what torch.save wrote ({reason}); the file is damaged") from error


def _load(path: Path, mapped: bool, size: int) -> tuple[Any, list]:
    """What torch makes of the file, and all of its storages in the order of the pickle."""
    try:
        import torch
    except ImportError as error:
        raise ConvertError(f"{path}: reading it needs torch; run pip install 'ml-mamba-jax[convert]'") from error
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < MIN_TORCH:
        raise ConvertError(
            f"{path}: got torch {torch.__version__}, which does not keep a file from executing code, expected at least "
            f"{'.'.join(map(str, MIN_TORCH))}; update it"
        )
    storages, left = [], size

    def place(storage, location):
        """Keep every storage on the CPU. Those to be read get memory that torch cannot grow, and only as much as the file has."""
        nonlocal left
        if not mapped:
            left -= storage.nbytes()
            if left < 0:
                raise ConvertError(
                    f"{path}: got tensors of more than the file's {size} bytes; it is damaged or cut short"
                )
            storage = torch.from_numpy(np.empty(storage.nbytes(), np.uint8)).untyped_storage()
        storages.append(storage)
        return storage

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about how the file was saved
        return torch.load(path, map_location=place, weights_only=True, mmap=mapped), storages


def _check_legacy(file: io.BufferedReader, size: int, path: Path) -> None:
    """A file of torch before 1.6: five pickles (magic number, version, system, tensors, storage names), then the bytes."""
    if size > MAX_LEGACY_SIZE:
        raise ConvertError(
            f"{path}: got {size} bytes in the format of torch before 1.6, which has to be read as a whole, expected at "
            f"most {MAX_LEGACY_SIZE}; load it with torch and torch.save it again"
        )
    file.seek(0)
    _check_pickle(file.read(MAX_PICKLE), path, count=5)


def _check_archive(file: io.BufferedReader, path: Path) -> list[tuple[int, int]]:
    """Offset and size of each storage. Refuses archives that torch.save does not write, and two readers may read differently."""

    def check(condition: bool, problem: str) -> None:
        if not condition:
            raise ConvertError(f"{path}: {problem}; the file is damaged, cut short, or not written by torch.save")

    start, size = _directory(file, check)
    check(size <= MAX_DIRECTORY, f"got a zip directory of {size} bytes, expected at most {MAX_DIRECTORY}")
    with zipfile.ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        names = [entry.filename for entry in entries]
        check(len({name.lower() for name in names}) == len(names), "got two zip entries of one name")
        roots = {name.split("/", 1)[0] for name in names}
        check(len(roots) == 1 and "/" in names[0], f"got zip entries under {len(roots)} folders, expected one")
        root = roots.pop()
        check(f"{root}/constants.pkl" not in names, "got a TorchScript archive, expected the state_dict of a model")
        check(f"{root}/data.pkl" in names, "found no data.pkl in the zip archive, expected what torch.save writes")
        storages = []
        for entry, end in zip(entries, [e.header_offset for e in entries[1:]] + [start], strict=True):
            name = entry.filename[:100]
            plain = entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size
            check(plain and not entry.flag_bits & 1, f"zip entry {name!r} is compressed, expected plain bytes")
            file.seek(entry.header_offset)
            local = file.read(30)
            check(len(local) == 30 and is_zip(local), f"zip entry {name!r} has no header")
            offset = entry.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
            check(offset + entry.file_size <= end, f"zip entry {name!r} overlaps what follows")
            if entry.filename.startswith(f"{root}/data/") and entry.file_size:
                storages.append((offset, entry.file_size))
        if f"{root}/byteorder" in names:
            order = archive.read(f"{root}/byteorder")[:20]
            check(order == b"little", f"got byte order {order!r}, expected b'little'")
        description = archive.getinfo(f"{root}/data.pkl")
        check(description.file_size <= MAX_PICKLE, f"got a pickle of {description.file_size} bytes")
        _check_pickle(archive.read(description), path, count=1)
    return storages


def _directory(file: io.BufferedReader, check) -> tuple[int, int]:
    """Offset and size of a zip directory, from the record at the very end of the file: torch writes no comment behind it."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 22))
    record = file.read()
    check(
        len(record) == 22 and record[:4] == b"PK\x05\x06" and record[20:] == b"\0\0",
        "found no zip directory at the end",
    )
    size, start = struct.unpack("<LL", record[12:20])
    position = end - 22
    file.seek(max(0, position - 20))
    locator = file.read(20)
    if locator[:4] == b"PK\x06\x07":  # more than 4 GiB
        position = struct.unpack("<Q", locator[8:16])[0]
        check(position == end - 22 - 20 - 56, "found no zip64 directory at the end")
        file.seek(position)
        size, start = struct.unpack("<QQ", file.read(56)[40:56])
    check(start + size == position, "got a zip directory that does not end where its record begins")
    return start, size


def _check_pickle(data: bytes, path: Path, count: int) -> None:
    """Refuse pickles, of which `count` follow each other, that name more than plain tensors or take much to read.

    Follows the stack of the pickle machine with weights in the place of objects. A weight is the number of instructions that an
    object would take if nothing in it was used twice: copying or hashing it takes no more steps than that.
    """
    stream, instructions, work = io.BytesIO(data), 0, 0
    try:
        for _ in range(count):
            stack, memo, key = [], {}, None
            for instruction, argument, _position in pickletools.genops(stream):
                name, before = instruction.name, instruction.stack_before
                if instruction.proto > 2:
                    raise ConvertError(
                        f"{path}: got pickle protocol {instruction.proto}, expected 2, torch.save's own; save it again"
                    )
                if name in ("GLOBAL", "INST") and not re.fullmatch(ALLOWED, argument):
                    of = f" for {key[:200]!r}" if key else ""
                    raise ConvertError(f"{path}: asks for {argument[:100].replace(' ', '.')}{of}, {PLAIN}")
                if name == "BINUNICODE" and argument not in ("storage", "cpu"):
                    key = argument
                if name in ("BINPUT", "LONG_BINPUT"):
                    memo[argument] = stack[-1]
                elif name in ("BINGET", "LONG_BINGET"):
                    stack.append(memo[argument])
                elif name == "MARK":
                    stack.append(None)
                else:
                    taken = []
                    if pickletools.markobject in before:
                        while (item := stack.pop()) is not None:
                            taken.append(item)
                    taken += [stack.pop() for kind in before if kind not in PICKLE_MARKS]
                    weight = taken.pop() if name in PICKLE_CHANGES else [1]  # a list, so that every use sees it grow
                    weight[0] += sum(item[0] for item in taken)
                    stack += [weight] * len(instruction.stack_after)
                    work += 1 + sum(item[0] for item in taken)
                instructions += 1
                if instructions > MAX_INSTRUCTIONS or work > MAX_WORK:
                    raise ConvertError(
                        f"{path}: got a pickle of more than {MAX_INSTRUCTIONS} instructions or {MAX_WORK} steps, {PLAIN}"
                    )
    except ConvertError:
        raise
    except Exception as error:  # of pickletools, or a stack that does not hold what is taken
        reason = str(error)[:200] or type(error).__name__
        raise ConvertError(f"{path}: got a damaged pickle ({reason}); the file is cut short or no weights") from error


def _flatten(content: Any, path: Path) -> tuple[dict[str, Any], list[str]]:
    """The tensors of nested dictionaries by joined keys, and the keys of the other leaves."""
    import torch

    if not isinstance(content, dict):
        raise ConvertError(f"{path}: got a {type(content).__name__}, {PLAIN}")
    tensors, others, visited = {}, [], 0

    def visit(branch: dict, prefix: str, depth: int) -> None:
        nonlocal visited
        for name, value in dict.items(branch):  # an OrderedDict from a pickle may have an `items` of its own
            visited += 1
            if not isinstance(name, str | int):
                raise ConvertError(f"{path}: got a {type(name).__name__} for a key under {prefix!r}, expected text")
            key = f"{prefix}{name}"
            if not 0 < len(key) <= MAX_KEY:
                raise ConvertError(f"{path}: got key {key[:50]!r} of {len(key)} letters, expected 1 to {MAX_KEY}")
            if depth > MAX_DEPTH or visited > MAX_KEYS:
                raise ConvertError(f"{path}: got dictionaries nested without end at {key[:50]!r}, {PLAIN}")
            if isinstance(value, dict):
                visit(value, f"{key}/", depth + 1)
            elif not isinstance(value, torch.Tensor):
                others.append(key)
            elif key in tensors:
                raise ConvertError(f"{path}: got tensor {key!r} twice, expected each key once")
            else:
                tensors[key] = value

    visit(content, "", 1)
    return tensors, others


def _check_storages(tensors: dict[str, Any], storages: list, entries: list[tuple[int, int]], path: Path) -> None:
    """Each storage is one whole entry of the archive, in the same order and at the same distances."""
    found = sorted((storage.data_ptr(), storage.nbytes()) for storage in storages if storage.nbytes())
    if len(found) != len(entries):
        raise ConvertError(f"{path}: got {len(found)} storages in the pickle, but {len(entries)} in the zip archive")
    for (address, n_bytes), (offset, size) in zip(found, entries, strict=True):
        if (address - found[0][0], n_bytes) != (offset - entries[0][0], size):
            names = [key for key, tensor in tensors.items() if tensor.untyped_storage().data_ptr() == address]
            raise ConvertError(
                f"{path}: tensor {names[0] if names else '?'!r} has a storage of {n_bytes} bytes in the pickle, but of {size} in "
                "the zip archive; the file is damaged"
            )


def _as_array(tensor, key: str, path: Path) -> np.ndarray:
    """A read-only view of the tensor's memory."""
    import torch

    def check(condition: bool, problem: str) -> None:
        if not condition:
            raise ConvertError(f"{path}: tensor {key!r} {problem}, {PLAIN}")

    dtype = str(tensor.dtype).removeprefix("torch.")
    check(type(tensor) in (torch.Tensor, torch.nn.Parameter), f"is a {type(tensor).__name__}")
    check(tensor.layout is torch.strided and tensor.device.type == "cpu", f"is {tensor.layout} on {tensor.device}")
    check(dtype in DTYPES, f"has dtype {dtype}, not one of {', '.join(DTYPES)}")
    check(not tensor.is_neg(), "is stored with its sign reversed")
    repeats = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    stored = tensor.untyped_storage().nbytes()
    check(
        not repeats and tensor.numel() * tensor.itemsize <= stored,
        f"repeats numbers: {list(tensor.shape)} from {stored} bytes",
    )
    plain, is_bfloat16 = tensor.detach(), tensor.dtype == torch.bfloat16  # NumPy needs to be told of bfloat16
    try:
        array = plain.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if is_bfloat16 else plain.numpy()
    except Exception as error:  # more axes than NumPy has
        raise ConvertError(f"{path}: tensor {key!r} cannot be read: {error}") from error
    array.flags.writeable = False
    return array
