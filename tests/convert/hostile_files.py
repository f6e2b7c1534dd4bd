"""Files and folders that a converter must refuse: malicious pickles, bombs, and everything that goes wrong with downloads.

`HOSTILE` maps a name to a builder and to what the error must say. A builder gets an empty folder, writes into it, and returns the
path to convert. A payload that is executed makes the file `CANARY` in that folder.
"""

import collections
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import torch

CANARY = "executed"
"""The file that an executed payload makes."""


class Hostile(NamedTuple):
    """How to make a hostile file, and a pattern that its error matches."""

    build: Callable[[Path], Path]
    expected: str


HOSTILE: dict[str, Hostile] = {}


def hostile(expected: str) -> Callable:
    """Add a builder to `HOSTILE` under its name."""

    def add(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
        HOSTILE[build.__name__] = Hostile(build, expected)
        return build

    return add


def saved(folder: Path, content: Any, name: str = "weights.pt", **options) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def written(folder: Path, content: bytes, name: str = "weights.pt") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


# Pickles


class Call:
    """Pickled as an instruction to call `function`, or with `state` to set the state of its result."""

    def __init__(self, function: Callable, *arguments: Any, state: Any = None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


class Storage(NamedTuple):
    """Pickled as torch refers to the bytes of a storage."""

    n: int
    key: str = "0"
    type: Any = torch.FloatStorage
    legacy: bool = False


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            return ("storage", obj.type, obj.key, "cpu", obj.n, *([None] if obj.legacy else []))
        return None


def pickled(content: Any, protocol: int = 2) -> bytes:
    stream = io.BytesIO()
    Pickler(stream, protocol).dump(content)
    return stream.getvalue()


def tensor(storage: Storage, shape: tuple, stride: tuple, offset: int = 0, dtype: Any = None) -> Call:
    """Pickled as torch pickles a tensor, whether there can be such a tensor or not."""
    hooks = collections.OrderedDict()
    if dtype is None:
        return Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, hooks)
    return Call(torch._utils._rebuild_tensor_v3, storage, offset, shape, stride, False, hooks, dtype)


def torch_zip(
    folder: Path,
    description: bytes,
    storages: dict[str, bytes] | None = None,
    name: str = "weights.pt",
    compression: int = zipfile.ZIP_STORED,
    more: dict[str, bytes] | None = None,
) -> Path:
    """The archive that torch.save writes, around any pickle and any bytes."""
    with zipfile.ZipFile(folder / name, "w", compression) as archive:
        archive.writestr("archive/data.pkl", description)
        archive.writestr("archive/version", b"3\n")
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
        for entry, content in (more or {}).items():
            archive.writestr(f"archive/{entry}", content)
    return folder / name


def legacy_file(folder: Path, description: bytes, keys: list[str], data: bytes = b"", name: str = "weights.pt") -> Path:
    """What torch wrote before version 1.6, around any pickle and any bytes."""
    parts = [pickled(torch.serialization.MAGIC_NUMBER), pickled(1001), pickled({"little_endian": True})]
    return written(folder, b"".join([*parts, description, pickled(keys), data]), name)


FOUR = np.arange(4, dtype=np.float32).tobytes()


def touch(folder: Path) -> tuple[Callable, str]:
    """A call that makes the canary."""
    return os.system, f"touch '{folder / CANARY}'"


def python(folder: Path) -> str:
    return f"open({str(folder / CANARY)!r}, 'w').close()"


@hostile(r"weights\.pt: asks for posix\.system for 'w', expected a dictionary of plain tensors")
def os_system(folder):
    return torch_zip(folder, pickled({"w": Call(*touch(folder))}))


@hostile(r"asks for __builtin__\.eval")
def eval_call(folder):
    return torch_zip(folder, pickled({"w": Call(eval, python(folder))}))


@hostile(r"asks for __builtin__\.exec")
def builtins_exec(folder):
    return torch_zip(folder, pickled({"w": Call(exec, python(folder))}))


@hostile(r"asks for __builtin__\.__import__")
def import_call(folder):
    return torch_zip(folder, pickled({"w": Call(__import__, "antigravity")}))


@hostile(r"asks for (subprocess|commands)\.Popen")
def subprocess_call(folder):
    import subprocess

    return torch_zip(folder, pickled({"w": Call(subprocess.Popen, ["touch", str(folder / CANARY)])}))


@hostile(r"asks for runpy\._run_code")
def runpy_call(folder):
    import runpy

    return torch_zip(folder, pickled({"w": Call(runpy._run_code, python(folder), {})}))


@hostile(r"asks for (functools\.partial|posix\.system)")
def partial_of_system(folder):
    import functools

    return torch_zip(folder, pickled({"w": Call(functools.partial(*touch(folder)))}))


@hostile(r"asks for __builtin__\.getattr")
def getattr_call(folder):
    return torch_zip(folder, pickled({"w": Call(getattr, str, "format")}))


@hostile(r"asks for tests\.convert\.hostile_files\.Evil")
def setstate(folder):
    return torch_zip(folder, pickled({"w": Evil(python(folder))}))


class Evil:
    """Executes its state when it is unpickled."""

    def __init__(self, code: str):
        self.code = code

    def __setstate__(self, state):
        exec(state["code"])


@hostile(r"asks for posix\.system")
def build_state_of_an_ordered_dict(folder):
    evil = Call(collections.OrderedDict, state={"items": Call(*touch(folder))})
    return torch_zip(folder, pickled({"w": evil}))


@hostile(r"asks for posix\.system for 'backbone\.weight'")
def nested_payload(folder):
    return torch_zip(folder, pickled({"model": {"llm_backbone": {"backbone.weight": [(Call(*touch(folder)),)]}}}))


@hostile(r"asks for posix\.system for 'b'")
def payload_among_good_tensors(folder):
    good = tensor(Storage(4), (4,), (1,))
    return torch_zip(folder, pickled({"a": good, "b": Call(*touch(folder))}), {"0": FOUR})


@hostile(r"asks for posix\.system")
def payload_in_the_hooks_of_a_tensor(folder):
    evil = Call(torch._utils._rebuild_tensor_v2, Storage(4), 0, (4,), (1,), False, Call(*touch(folder)))
    return torch_zip(folder, pickled({"w": evil}), {"0": FOUR})


@hostile(r"asks for posix\.system")
def protocol_0(folder):
    return torch_zip(folder, pickled({"w": Call(*touch(folder))}, protocol=0))


@hostile(r"asks for posix\.system")
def protocol_1(folder):
    return torch_zip(folder, pickled({"w": Call(*touch(folder))}, protocol=1))


@hostile(r"asks for posix\.system")
def protocol_3(folder):
    return torch_zip(folder, pickled({"w": Call(*touch(folder))}, protocol=3))


@hostile(r"got pickle protocol 4, expected 2")
def protocol_4(folder):
    return torch_zip(folder, pickled({"w": Call(*touch(folder))}, protocol=4))


@hostile(r"got pickle protocol 4, expected 2")
def protocol_5(folder):
    return torch_zip(folder, pickled({"w": Call(*touch(folder))}, protocol=5))


@hostile(r"asks for (os|posix)\.system")
def instruction_inst(folder):
    return torch_zip(folder, b"(S'touch " + str(folder / CANARY).encode() + b"'\nios\nsystem\n.")


@hostile(r"model\.bin: asks for posix\.system")
def raw_pickle(folder):
    return written(folder, pickled(Call(*touch(folder))), "model.bin")


@hostile(r"got a file that starts with b'c(posix|os)")
def raw_pickle_of_protocol_0(folder):
    return written(folder, pickle.dumps(Call(*touch(folder)), protocol=0))


@hostile(r"got pickle protocol 4")
def raw_pickle_of_protocol_5(folder):
    return written(folder, pickle.dumps(Call(*touch(folder)), protocol=5))


@hostile(r"asks for posix\.system for 'w'")
def legacy_payload(folder):
    return legacy_file(folder, pickled({"w": Call(*touch(folder))}), [])


@hostile(r"asks for posix\.system")
def legacy_payload_in_the_storage_keys(folder):
    return legacy_file(folder, pickled({"w": 1}), Call(*touch(folder)))


@hostile(r"model\.safetensors: got a file of torch\.save named \.safetensors")
def payload_named_safetensors(folder):
    return torch_zip(folder, pickled({"w": Call(*touch(folder))}), name="model.safetensors")


@hostile(r"model\.safetensors: got a file of torch\.save named \.safetensors")
def raw_pickle_in_a_folder_as_safetensors(folder):
    written(folder, pickled(Call(*touch(folder))), "model.safetensors")
    return folder


@hostile(r"asks for posix\.system")
def payload_in_a_shard(folder):
    torch_zip(folder, pickled({"w": Call(*touch(folder))}), name="shard.bin")
    return index(folder, {"w": "shard.bin"}, "pytorch_model.bin.index.json")


@hostile(r"got a TorchScript archive")
def torchscript(folder):
    return torch_zip(folder, pickled({}), more={"constants.pkl": pickled(Call(*touch(folder)))})


@hostile(r"got a file that starts with")
def tar_of_old_torch(folder):
    import tarfile

    with tarfile.open(folder / "weights.pt", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickled(Call(*touch(folder)))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder / "weights.pt"


# Tensors that are not what they say


@hostile(r"tensor 'w' repeats numbers: \[100000, 100000\] from 4 bytes")
def expanded_tensor(folder):
    return saved(folder, {"w": torch.zeros(1).expand(100_000, 100_000)})


@hostile(r"tensor 'w' repeats numbers: \[1000, 1000, 1000\] from 4 bytes")
def expanded_tensor_in_a_legacy_file(folder):
    return saved(folder, {"w": torch.zeros(1).expand(1000, 1000, 1000)}, _use_new_zipfile_serialization=False)


@hostile(r"tensor 'w' repeats numbers: \[2, 3\] from 16 bytes")
def overlapping_rows(folder):
    return torch_zip(folder, pickled({"w": tensor(Storage(4), (2, 3), (1, 1))}), {"0": FOUR})


@hostile(r"cannot read what torch\.save wrote")
def strides_beyond_the_storage(folder):
    return torch_zip(folder, pickled({"w": tensor(Storage(4), (2, 2), (1000, 1))}), {"0": FOUR})


@hostile(r"cannot read what torch\.save wrote")
def offset_beyond_the_storage(folder):
    return torch_zip(folder, pickled({"w": tensor(Storage(4), (4,), (1,), offset=2**40)}), {"0": FOUR})


@hostile(r"cannot read what torch\.save wrote")
def negative_stride(folder):
    return torch_zip(folder, pickled({"w": tensor(Storage(4), (4,), (-1,), offset=3)}), {"0": FOUR})


@hostile(r"cannot read what torch\.save wrote")
def shape_that_overflows(folder):
    return torch_zip(folder, pickled({"w": tensor(Storage(4), (2**40, 2**40), (1, 1))}), {"0": FOUR})


@hostile(r"tensor 'w' cannot be read")
def too_many_axes(folder):
    return torch_zip(folder, pickled({"w": tensor(Storage(4), (1,) * 100, (1,) * 100)}), {"0": FOUR})


@hostile(r"tensor 'w' has a storage of 32 bytes in the pickle, but of 16 in the zip archive")
def storage_larger_than_its_entry(folder):
    both = {"w": tensor(Storage(8), (8,), (1,)), "v": tensor(Storage(4, "1"), (4,), (1,))}
    return torch_zip(folder, pickled(both), {"0": FOUR, "1": FOUR * 10})


@hostile(r"weights\.pt: ")
def storage_larger_than_the_file(folder):
    return torch_zip(folder, pickled({"w": tensor(Storage(10**9), (4,), (1,))}), {"0": FOUR})


@hostile(r"cannot read what torch\.save wrote .*data/7")
def storage_that_is_missing(folder):
    return torch_zip(folder, pickled({"w": tensor(Storage(4, "7"), (4,), (1,))}), {"0": FOUR})


@hostile(r"got 1 storages in the pickle, but 2 in the zip archive")
def storage_that_nothing_uses(folder):
    return torch_zip(folder, pickled({"w": tensor(Storage(4), (4,), (1,))}), {"0": FOUR, "1": FOUR})


@hostile(r"got tensors of more than the file's \d+ bytes")
def legacy_storage_larger_than_the_file(folder):
    storage = Storage(100_000_000, legacy=True)
    return legacy_file(folder, pickled({"w": tensor(storage, (4,), (1,))}), ["0"], struct.pack("<q", 4) + FOUR)


@hostile(r"cannot read what torch\.save wrote .*not resizable")
def legacy_tensor_that_grows_its_storage(folder):
    grown = tensor(Storage(4, legacy=True), (100_000_000,), (1,))
    return legacy_file(folder, pickled({"w": grown}), ["0"], struct.pack("<q", 4) + FOUR)


@hostile(r"asks for torch\._utils\._rebuild_sparse_tensor for 'w'")
def sparse_tensor(folder):
    return saved(folder, {"w": torch.eye(3).to_sparse()})


@hostile(r"asks for torch\._utils\._rebuild_qtensor for 'w'")
def quantized_tensor(folder):
    values = tensor(Storage(4), (4,), (1,)).reduced[1]
    return torch_zip(folder, pickled({"w": Call(torch._utils._rebuild_qtensor, *values)}), {"0": FOUR})


@hostile(r"asks for torch\._utils\._rebuild_meta_tensor_no_storage for 'w'")
def meta_tensor(folder):
    return saved(folder, {"w": torch.empty(10**6, 10**6, device="meta")})


@hostile(r"asks for torch\._tensor\._rebuild_from_type_v2 for 'w'")
def tensor_with_attributes(folder):
    weight = torch.zeros(3)
    weight.note = "a state beside the numbers"
    return saved(folder, {"w": weight})


@hostile(r"tensor 'w' has dtype complex64, not one of float64, .*, expected a dictionary of plain tensors")
def complex_tensor(folder):
    return saved(folder, {"w": torch.zeros(3, dtype=torch.complex64)})


@hostile(r"asks for torch\._utils\._rebuild_tensor_v3 for 'w'")
def float8_tensor(folder):
    return saved(folder, {"w": torch.zeros(4).to(torch.float8_e4m3fn)})


@hostile(r"tensor 'w' is stored with its sign reversed")
def negated_tensor(folder):
    reversed_sign = Call(
        torch._utils._rebuild_tensor_v2, Storage(4), 0, (4,), (1,), False, collections.OrderedDict(), {"neg": True}
    )
    return torch_zip(folder, pickled({"w": reversed_sign}), {"0": FOUR})


# Objects that take memory or time


@hostile(r"asks for __builtin__\.bytearray")
def bytes_without_end(folder):
    return torch_zip(folder, pickled({"w": Call(bytearray, 10**10)}))


@hostile(r"asks for torch\._utils\._rebuild_device_tensor_from_cpu_tensor")
def expanded_tensor_that_is_copied(folder):
    expanded = tensor(Storage(4), (10**5, 10**5), (0, 0))
    copied = Call(torch._utils._rebuild_device_tensor_from_cpu_tensor, expanded, torch.float64, "cpu", False)
    return torch_zip(folder, pickled({"w": copied}), {"0": FOUR})


@hostile(r"asks for _codecs\.encode")
def doubling_encoder(folder):
    import _codecs

    doubled: Any = "aa"
    for _ in range(40):
        doubled = Call(_codecs.encode, doubled, "hex")
    return torch_zip(folder, pickled({"w": doubled}))


@hostile(r"got a pickle of more than")
def dictionary_copied_many_times(folder):
    large = dict.fromkeys(range(20_000))
    return torch_zip(folder, pickled([large, *(Call(collections.OrderedDict, large) for _ in range(20_000))]))


@hostile(r"got a pickle of more than")
def hash_without_end(folder):
    doubled: tuple = ()
    for _ in range(60):
        doubled = (doubled, doubled)
    # Pickled by hand: hashing the key here would not end either.
    return torch_zip(folder, b"\x80\x02}" + pickled(doubled)[2:-1] + b"Ns.")


@hostile(r"got a pickle of more than")
def million_objects(folder):
    return torch_zip(folder, b"\x80\x02" + b"]" * 2_000_000 + b".")


@hostile(r"got dictionaries nested without end")
def dictionary_in_itself(folder):
    endless: dict = {"w": 1}
    endless["again"] = endless
    return torch_zip(folder, pickled(endless))


@hostile(r"got a pickle of more than")
def dictionary_of_great_depth(folder):
    return torch_zip(folder, b"\x80\x02" + b"}X\x01\0\0\0a" * 50_000 + b"}" + b"s" * 50_000 + b".")


@hostile(r"got a pickle of more than")
def dictionaries_that_double(folder):
    branch: dict = {}
    for _ in range(15):
        branch = dict.fromkeys("abcdefgh", branch)
    return torch_zip(folder, pickled(branch))


@hostile(r"got dictionaries nested without end")
def dictionaries_that_double_afterwards(folder):
    """Put into each other while they are empty: their weights are small."""
    made = b"".join(b"}q%c" % i for i in range(15))
    filled = b"".join(
        b"h%c(" % i + b"".join(b"X\x01\0\0\0%ch%c" % (name, i + 1) for name in b"abcdefgh") + b"u" for i in range(14)
    )
    return torch_zip(folder, b"\x80\x02" + made + filled + b"h\0.")


@hostile(r"got key 'kkkkk.* of 100000 letters, expected 1 to 1000")
def key_without_end(folder):
    return saved(folder, {"k" * 100_000: torch.zeros(1)})


@hostile(r"got a pickle of \d+ bytes")
def pickle_without_end(folder):
    return torch_zip(folder, pickled({"w": "x" * 20_000_000}))


# Archives


@hostile(r"zip entry 'archive/data/0' is compressed")
def zip_bomb(folder):
    bomb = pickled({"w": tensor(Storage(25_000_000), (25_000_000,), (1,))})
    torch_zip(folder, bomb, {"0": bytes(100_000_000)})
    with zipfile.ZipFile(folder / "weights.pt") as plain, zipfile.ZipFile(folder / "bomb.pt", "w") as archive:
        archive.writestr("archive/data.pkl", plain.read("archive/data.pkl"))
        archive.writestr("archive/data/0", plain.read("archive/data/0"), zipfile.ZIP_DEFLATED)
    return folder / "bomb.pt"


@hostile(r"zip entry 'archive/data\.pkl' is compressed")
def compressed_pickle(folder):
    return torch_zip(folder, pickled({"w": "x" * 10**8}), compression=zipfile.ZIP_DEFLATED)


def patched(path: Path, find: bytes, replace: bytes, last: bool = False) -> Path:
    """Change bytes of a file, of the same number."""
    content = path.read_bytes()
    at = content.rindex(find) if last else content.index(find)
    return written(path.parent, content[:at] + replace + content[at + len(find) :], path.name)


def two_storages(folder: Path) -> Path:
    both = {"w": tensor(Storage(4), (4,), (1,)), "v": tensor(Storage(4, "1"), (4,), (1,))}
    return torch_zip(folder, pickled(both), {"0": FOUR, "1": bytes(16)})


@hostile(r"zip entry 'archive/data/0' overlaps what follows")
def overlapping_entries(folder):
    path = two_storages(folder)
    with zipfile.ZipFile(path) as archive:
        record = archive.getinfo("archive/data/0")
    sizes = struct.pack("<LLL", record.CRC, 16, 16)
    return patched(path, sizes, struct.pack("<LLL", record.CRC, 64, 64), last=True)


@hostile(r"two zip entries of one name")
def same_name_twice(folder):
    path = torch_zip(folder, pickled({}), more={"Data.pkl": pickled(Call(*touch(folder)))})
    return path


@hostile(r"got zip entries under 2 folders, expected one")
def two_archives_in_one(folder):
    with zipfile.ZipFile(folder / "weights.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickled({}))
        archive.writestr("b/data.pkl", pickled(Call(*touch(folder))))
    return folder / "weights.pt"


@hostile(r"found no data\.pkl")
def zip_of_something_else(folder):
    with zipfile.ZipFile(folder / "weights.pt", "w") as archive:
        archive.writestr("paper/figure.svg", "<svg/>")
    return folder / "weights.pt"


@hostile(r"found no zip directory at the end|does not end where its record begins")
def bytes_behind_the_archive(folder):
    path = two_storages(folder)
    return written(folder, path.read_bytes() + bytes(100))


@hostile(r"does not end where its record begins")
def second_archive_in_front(folder):
    front = torch_zip(folder, pickled({"w": Call(*touch(folder))})).read_bytes()
    return written(folder, front + two_storages(folder).read_bytes())


@hostile(r"zip directory of 2\d{9} bytes|does not end where its record begins")
def directory_without_end(folder):
    path = two_storages(folder)
    content = path.read_bytes()
    return written(folder, content[:-10] + struct.pack("<L", 2_100_000_000) + content[-6:])


@hostile(r"got byte order b'big'")
def other_byte_order(folder):
    good = pickled({"w": tensor(Storage(4), (4,), (1,))})
    return torch_zip(folder, good, {"0": FOUR}, more={"byteorder": b"big"})


@hostile(r"found no zip directory at the end")
def truncated_zip(folder):
    path = saved(folder, {"w": torch.zeros(1000)})
    return written(folder, path.read_bytes()[:-100])


@hostile(r"weights\.pt: (cannot read what torch\.save wrote|got a damaged pickle)")
def truncated_legacy_file(folder):
    path = saved(folder, {"w": torch.zeros(1000)}, _use_new_zipfile_serialization=False)
    return written(folder, path.read_bytes()[:-100])


@hostile(r"got a damaged pickle")
def truncated_legacy_pickle(folder):
    path = saved(folder, {"w": torch.zeros(1000)}, _use_new_zipfile_serialization=False)
    return written(folder, path.read_bytes()[:150])


@hostile(r"got \d+ bytes in the format of torch before 1\.6, .*torch\.save it again")
def large_legacy_file(folder):
    path = saved(folder, {"w": torch.zeros(1000)}, _use_new_zipfile_serialization=False)
    os.truncate(path, 2**31 + 1)  # a hole: it takes no room
    return path


# Content that is not a dictionary of tensors


@hostile(r"got a Tensor, expected a dictionary")
def bare_tensor(folder):
    return saved(folder, torch.zeros(3))


@hostile(r"got a list, expected a dictionary")
def list_of_tensors(folder):
    return saved(folder, [torch.zeros(3)])


@hostile(r"found no tensors")
def no_tensors(folder):
    return saved(folder, {"step": 3, "name": "empty"})


@hostile(r"asks for torch\.nn\.modules\.linear\.Linear, expected .*save its state_dict alone")
def whole_module(folder):
    return saved(folder, torch.nn.Linear(2, 2))


@hostile(r"got tensor 'a/b' twice")
def keys_that_become_one(folder):
    return saved(folder, {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}})


@hostile(r"got a tuple for a key under 'model/', expected text")
def key_that_is_no_text(folder):
    return saved(folder, {"model": {(1, 2): torch.zeros(1)}})


@hostile(r"got a Tensor for a key")
def key_that_is_a_tensor(folder):
    return saved(folder, {torch.zeros(1): torch.zeros(1)})


@hostile(r"found no tensors")
def dictionary_whose_items_are_replaced(folder):
    replaced = Call(collections.OrderedDict, state={"items": 3, "keys": collections.OrderedDict})
    return torch_zip(folder, pickled(replaced))


# safetensors


def safetensors_file(folder: Path, header: Any, data: bytes = b"", size: int | None = None) -> Path:
    """A file around any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return written(folder, struct.pack("<Q", len(text) if size is None else size) + text + data, "model.safetensors")


def entry(start: int = 0, end: int = 16, shape: tuple = (4,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


BROKEN = r"model\.safetensors: cannot read the file as safetensors \(.+\)"


@hostile(r"model\.safetensors: got a header of 9223372036854775807 bytes")
def header_of_great_length(folder):
    return safetensors_file(folder, {"w": entry()}, FOUR, size=2**63 - 1)


@hostile(BROKEN)
def header_longer_than_the_file(folder):
    return safetensors_file(folder, {"w": entry()}, FOUR, size=5000)


@hostile(BROKEN)
def header_cut_short(folder):
    return safetensors_file(folder, {"w": entry()}, FOUR, size=20)


@hostile(BROKEN)
def header_that_is_no_json(folder):
    return safetensors_file(folder, b"{'w': 4}", FOUR)


@hostile(BROKEN)
def header_that_is_no_utf8(folder):
    return safetensors_file(folder, b'{"\xff\xfe": 1}', FOUR)


@hostile(BROKEN)
def header_nested_without_end(folder):
    return safetensors_file(folder, b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}", FOUR)


@hostile(BROKEN + r"|got 'w' twice")
def header_with_a_key_twice(folder):
    one = json.dumps(entry())
    return safetensors_file(folder, f'{{"w": {one}, "w": {one}}}'.encode(), FOUR)


@hostile(BROKEN)
def overlapping_tensors(folder):
    return safetensors_file(folder, {"w": entry(), "v": entry()}, FOUR)


@hostile(BROKEN)
def tensor_beyond_the_file(folder):
    return safetensors_file(folder, {"w": entry(0, 1600, (400,))}, FOUR)


@hostile(BROKEN)
def shape_other_than_its_bytes(folder):
    return safetensors_file(folder, {"w": entry(shape=(5,))}, FOUR)


@hostile(BROKEN)
def safetensors_shape_that_overflows(folder):
    return safetensors_file(folder, {"w": entry(shape=(2**62, 2**62))}, FOUR)


@hostile(BROKEN)
def negative_axis(folder):
    return safetensors_file(folder, {"w": entry(shape=(-4,))}, FOUR)


@hostile(BROKEN)
def unknown_dtype(folder):
    return safetensors_file(folder, {"w": entry(dtype="F99")}, FOUR)


@hostile(r"tensor 'w' has dtype F8_E4M3, expected one of F64, F32")
def float8_safetensors(folder):
    return safetensors_file(folder, {"w": entry(shape=(16,), dtype="F8_E4M3")}, FOUR)


@hostile(r"tensor 'w' has a shape that cannot be used")
def empty_tensor_of_great_shape(folder):
    return safetensors_file(folder, {"v": entry(), "w": entry(16, 16, (0, 2**40, 2**22))}, FOUR)


@hostile(r"tensor 'w' has a shape that cannot be used")
def safetensors_of_too_many_axes(folder):
    return safetensors_file(folder, {"w": entry(shape=(4, *[1] * 100))}, FOUR)


@hostile(r"got key 'kkkkk.* of 100000 letters, expected at most 1000")
def safetensors_key_without_end(folder):
    return safetensors_file(folder, {"k" * 100_000: entry()}, FOUR)


@hostile(BROKEN)
def safetensors_with_bytes_behind(folder):
    return safetensors_file(folder, {"w": entry()}, FOUR * 2)


@hostile(BROKEN)
def truncated_safetensors(folder):
    safetensors.numpy.save_file({"w": np.zeros(1000)}, folder / "model.safetensors")
    return written(folder, (folder / "model.safetensors").read_bytes()[:-100], "model.safetensors")


@hostile(r"found no tensors")
def safetensors_without_tensors(folder):
    return safetensors_file(folder, {"__metadata__": {"format": "pt"}})


# Files that are no weights


@hostile(r"weights\.pt: found no such file")
def missing_file(folder):
    return folder / "weights.pt"


@hostile(r"got an empty file")
def empty_file(folder):
    return written(folder, b"")


@hostile(r"got a web page, .*download it again")
def web_page(folder):
    return written(folder, b"\n<!DOCTYPE html><html><title>404</title></html>", "pytorch_model.bin")


@hostile(r"got a git-lfs pointer, .*run git lfs pull")
def lfs_pointer(folder):
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5410000000\n"
    return written(folder, text.encode(), "model.safetensors")


@hostile(r"got a file that starts with b'hello'")
def text_file(folder):
    return written(folder, b"hello")


@hostile(r"found no such file")
def link_to_itself(folder):
    (folder / "weights.pt").symlink_to("weights.pt")
    return folder / "weights.pt"


@hostile(r"got a device, expected a file of weights")
def pipe(folder):
    os.mkfifo(folder / "weights.pt")
    return folder / "weights.pt"


# Folders


def index(folder: Path, shard_of: Any, name: str = "model.safetensors.index.json") -> Path:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return folder


def shard(folder: Path, keys: str, name: str) -> None:
    safetensors.numpy.save_file({key: np.zeros(3, np.float32) for key in keys}, folder / name)


@hostile(r"found no weights, expected one of model\.safetensors, .*open_clip_pytorch_model\.bin")
def folder_without_weights(folder):
    (folder / "config.json").write_text("{}")
    return folder


@hostile(r"model\.safetensors: got a folder, expected a file of weights")
def folder_in_place_of_a_file(folder):
    (folder / "model.safetensors").mkdir()
    return folder


@hostile(r"index\.json: cannot be read as JSON")
def index_that_is_no_json(folder):
    (folder / "model.safetensors.index.json").write_text("{'weight_map': ")
    return folder


@hostile(r"index\.json: cannot be read as JSON")
def index_nested_without_end(folder):
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    return folder


@hostile(r"index\.json: cannot be read as JSON")
def index_that_is_no_utf8(folder):
    (folder / "model.safetensors.index.json").write_bytes(b'{"weight_map": "\xff"}')
    return folder


@hostile(r"index\.json: cannot be read as JSON")
def index_of_utf16(folder):
    (folder / "model.safetensors.index.json").write_bytes('{"weight_map": {"w": "a"}}'.encode("utf-16"))
    return folder


@hostile(r"index\.json: found no weight_map")
def index_without_weight_map(folder):
    (folder / "model.safetensors.index.json").write_text("[]")
    return folder


@hostile(r"index\.json: found no weight_map")
def index_of_nothing(folder):
    return index(folder, {})


@hostile(r"index\.json: got more than \d+ bytes")
def index_without_end(folder):
    (folder / "model.safetensors.index.json").write_bytes(b" " * 20_000_000)
    return folder


@hostile(r"index\.json: tensor 'w' has int '7' for its file")
def index_with_a_number_for_a_file(folder):
    return index(folder, {"w": 7})


@hostile(r"index\.json: got 'w' twice")
def index_with_a_key_twice(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}')
    return folder


def outside(folder: Path) -> Path:
    """The folder of a model that stands beside a good file."""
    shard(folder, "w", "outside.safetensors")
    (folder / "model").mkdir()
    return folder / "model"


ELSEWHERE = r"index\.json: tensor 'w' is in '.*', expected the name of a file in the same folder"


@hostile(ELSEWHERE)
def index_leading_up(folder):
    return index(outside(folder), {"w": "../outside.safetensors"})


@hostile(ELSEWHERE)
def index_with_an_absolute_path(folder):
    return index(outside(folder), {"w": str(folder / "outside.safetensors")})


@hostile(ELSEWHERE)
def index_leading_down(folder):
    (folder / "below").mkdir()
    shard(folder / "below", "w", "inside.safetensors")
    return index(folder, {"w": "below/inside.safetensors"})


@hostile(ELSEWHERE)
def index_naming_the_parent(folder):
    return index(outside(folder), {"w": ".."})


@hostile(ELSEWHERE)
def index_with_a_zero_byte(folder):
    return index(folder, {"w": "model\0.safetensors"})


@hostile(r"cannot read the file: File name too long")
def index_with_a_long_name(folder):
    return index(folder, {"w": "n" * 300})


@hostile(ELSEWHERE)
def index_with_a_path_without_end(folder):
    return index(folder, {"w": "up/" * 100_000})


@hostile(r"shard\.safetensors: is a link to .*outside\.safetensors, expected a file in the folder")
def link_leading_outside(folder):
    model = outside(folder)
    (model / "shard.safetensors").symlink_to("../outside.safetensors")
    return index(model, {"w": "shard.safetensors"})


@hostile(r"shard\.safetensors: found no such file, but model\.safetensors\.index\.json says that it holds tensor 'w'")
def missing_shard(folder):
    return index(folder, {"w": "shard.safetensors"})


@hostile(r"index\.json: differs from its files: shard\.safetensors lacks tensor 'v'")
def shard_lacking_a_tensor(folder):
    shard(folder, "w", "shard.safetensors")
    return index(folder, {"w": "shard.safetensors", "v": "shard.safetensors"})


@hostile(r"index\.json: differs from its files: shard\.safetensors holds tensor 'v' too")
def shard_with_one_tensor_more(folder):
    shard(folder, "wv", "shard.safetensors")
    return index(folder, {"w": "shard.safetensors"})


@hostile(r"index\.json: differs from its files: b\.safetensors holds tensor 'w' too")
def tensor_in_two_shards(folder):
    shard(folder, "w", "a.safetensors")
    shard(folder, "wv", "b.safetensors")
    return index(folder, {"w": "a.safetensors", "v": "b.safetensors"})


@hostile(r"index\.json: names 2 files .*expected each number once")
def too_few_shards(folder):
    names = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"]
    for key, name in zip("wv", names, strict=True):
        shard(folder, key, name)
    return index(folder, dict(zip("wv", names, strict=True)))


@hostile(r"shard\.safetensors: got an empty file")
def empty_shard(folder):
    (folder / "shard.safetensors").touch()
    return index(folder, {"w": "shard.safetensors"})
