"""Files of weights: every format read bit by bit, nothing copied, nothing executed, one error for everything else."""

import ast
import codecs
import itertools
import json
import os
import random
import re
import resource
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from ml_mamba_jax.convert.weight_files import TensorInfo, open_weights
from ml_mamba_jax.errors import ConvertError, InputError
from tests.convert.hostile_files import CANARY, HOSTILE

DTYPES = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int16: np.int16,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}
SHAPES = {"matrix": (3, 4), "row": (7,), "number": (), "nothing": (0, 5), "nothing else": (0, 5), "conv": (2, 1, 4)}


def noise(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Every bit random, NaNs included."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    count = int(np.prod(shape))
    bits = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8)
    return bits.view(dtype).reshape(shape) if count else torch.zeros(shape, dtype=dtype)


def all_kinds() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"{dtype}/{name}": noise(dtype, shape) for dtype in DTYPES for name, shape in SHAPES.items()}


def save_zip(tensors, path):
    torch.save(tensors, path)


def save_legacy(tensors, path):
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


SAVERS = {"zip": save_zip, "legacy": save_legacy, "safetensors": safetensors.torch.save_file}


def assert_same(array: np.ndarray, tensor: torch.Tensor) -> None:
    assert array.dtype == DTYPES[tensor.dtype] and array.shape == tuple(tensor.shape)
    assert array.tobytes() == bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())


NAMES = ("weights.pt", "pytorch_model.bin", "weights")


@pytest.mark.parametrize("kind, name", [*itertools.product(SAVERS, NAMES), ("safetensors", "model.safetensors")])
def test_every_dtype_bit_by_bit_whatever_the_file_is_called(tmp_path, kind, name):
    tensors, path = all_kinds(), tmp_path / name
    SAVERS[kind](tensors, path)
    with open_weights(path) as weights:
        assert weights.files == [path] and weights.others == [] and weights.aliases() == {}
        assert set(weights) == set(tensors) and len(weights) == len(tensors) and "absent" not in weights
        for key, tensor in tensors.items():
            assert weights.info(key) == TensorInfo(tuple(tensor.shape), np.dtype(DTYPES[tensor.dtype]), path)
            assert_same(weights[key], tensor)


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_tensors_that_are_views_of_others_read_right(tmp_path, save):
    matrix = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "turned": matrix.t(),
        "cut": matrix[1:, ::2],
        "axes": matrix.reshape(2, 2, 6).permute(2, 0, 1),
        "half": matrix.to(torch.bfloat16).t(),
        "parameter": torch.nn.Parameter(matrix[2]),
    }
    save(tensors, tmp_path / "w.pt")
    weights = open_weights(tmp_path / "w.pt")
    for key, tensor in tensors.items():
        assert_same(weights[key], tensor.detach())
    np.testing.assert_array_equal(weights["turned"], np.arange(24.0).reshape(4, 6).T)


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_tied_tensors_are_found(tmp_path, save):
    embedding, other = torch.randn(3, 3), torch.randn(4, 3)
    content = {
        "embedding.weight": embedding,
        "norm": other[0],
        "row": embedding[0],  # of the same storage, but another tensor
        "turned": embedding.t(),
        "lm_head.weight": embedding,
        "copy": embedding.clone(),
        "again": embedding.detach(),
        "none": torch.zeros(0),
        "nothing": torch.zeros(0),
    }
    save(content, tmp_path / "w.pt")
    weights = open_weights(tmp_path / "w.pt")
    assert weights.aliases() == {"lm_head.weight": "embedding.weight", "again": "embedding.weight"}
    assert list(weights) == list(content), "the order of the file"


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_nested_dictionaries_and_what_is_no_tensor(tmp_path, save):
    state_dict = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3)).state_dict()  # with metadata
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2)) for _ in range(3)])
    save(
        {
            "model": {"llm_backbone": {"backbone.embedding.weight": torch.ones(2)}, "mlp": state_dict},
            "optimizer": optimizer.state_dict(),
            "step": 3,
            "name": "stage-2",
            "shape": torch.Size([1, 2]),
            "dtype": torch.bfloat16,
            "nothing": None,
            "empty": {},
        },
        tmp_path / "w.pt",
    )
    weights = open_weights(tmp_path / "w.pt")
    assert list(weights) == [
        "model/llm_backbone/backbone.embedding.weight",
        *(f"model/mlp/{key}" for key in state_dict),
    ]
    assert weights.others == ["optimizer/param_groups", "step", "name", "shape", "dtype", "nothing"]
    assert_same(weights["model/mlp/0.weight"], state_dict["0.weight"])


def shards(folder: Path, safe: bool) -> dict[str, torch.Tensor]:
    """A sharded model of three files."""
    tensors = {f"layer.{i}": torch.full((2, 2), float(i)) for i in range(6)}
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    names = [f"{stem}-{i:05d}-of-00003.{suffix}" for i in (1, 2, 3)]
    shard_of = {key: names[i // 2] for i, key in enumerate(tensors)}
    folder.mkdir(exist_ok=True, parents=True)
    for name in names:
        SAVERS["safetensors" if safe else "zip"](
            {key: tensor for key, tensor in tensors.items() if shard_of[key] == name}, folder / name
        )
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return tensors


@pytest.mark.parametrize("safe", [True, False])
def test_sharded_models(tmp_path, safe):
    tensors = shards(tmp_path, safe)
    for path in (tmp_path, next(tmp_path.glob("*.index.json"))):
        weights = open_weights(path)
        assert list(weights) == list(tensors) and len(weights.files) == 3
        assert weights.info("layer.3").file == weights.files[1]
        for key, tensor in tensors.items():
            assert_same(weights[key], tensor)


def test_links_of_a_hub_cache_are_followed(tmp_path):
    """Its files are links from snapshots/<revision>/ to blobs/."""
    snapshot, blobs = tmp_path / "snapshots" / "0a1b", tmp_path / "blobs"
    tensors = shards(snapshot, safe=True)
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / f"sha-{path.name}")
        path.symlink_to(f"../../blobs/sha-{path.name}")
    assert list(open_weights(snapshot)) == list(tensors)


FOLDERS = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
    "checkpoints/latest-checkpoint.pt",
)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_file_of_a_folder_is_found(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    SAVERS["safetensors" if name.endswith(".safetensors") else "zip"]({"w": torch.ones(2)}, tmp_path / name)
    assert open_weights(str(tmp_path)).files == [tmp_path / name]


def test_safetensors_are_preferred(tmp_path):
    shards(tmp_path, safe=False)
    save_zip({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert open_weights(tmp_path).files == [tmp_path / "pytorch_model.bin"]
    shards(tmp_path, safe=True)
    assert len(open_weights(tmp_path).files) == 3
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert open_weights(tmp_path).files == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_arrays_are_read_only_and_outlive_the_files(tmp_path, save):
    path = tmp_path / "w.pt"
    save({"w": torch.ones(3), "half": torch.ones(3, dtype=torch.bfloat16)}, path)
    path.chmod(0o444)
    before = path.read_bytes()
    with open_weights(path) as weights:
        arrays = dict(weights)
    assert len(weights) == 0
    for array in arrays.values():
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 2
        assert array.tolist() == [1, 1, 1]
    assert path.read_bytes() == before


def anonymous_memory() -> int:
    """Bytes of memory that is no file's."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save", [save_zip, safetensors.torch.save_file], ids=["zip", "safetensors"])
def test_nothing_is_copied(tmp_path, save, dtype):
    save({"w": torch.zeros(0)}, tmp_path / "small")
    open_weights(tmp_path / "small")  # imports
    save({"w": torch.ones(200_000_000 // dtype.itemsize, dtype=dtype)}, tmp_path / "w")
    before = anonymous_memory()
    with open_weights(tmp_path / "w") as weights:
        array = weights["w"]
        assert array.view(np.uint8).max() > 0 and array.nbytes == 200_000_000, "every page was read"
        assert anonymous_memory() - before < 20_000_000


class Audit:
    """Records the events that code which a file brings along could not do without."""

    WATCHED = frozenset(
        "compile exec pickle.find_class subprocess.Popen os.system os.exec os.fork os.posix_spawn os.remove shutil.rmtree "  # noqa: SIM905
        "socket.connect ctypes.dlopen webbrowser.open".split()
    )

    def __init__(self):
        self.armed, self.events = False, []
        sys.addaudithook(self)  # for the rest of the process: there is no way to remove it

    def __call__(self, event, arguments):
        if self.armed and (event in self.WATCHED or (event == "import" and arguments[0] == "antigravity")):
            by = Path(sys._getframe(1).f_code.co_filename).parts
            if not {"jaxtyping", "beartype"} & set(by):  # which make the checks that tests add to nested functions
                self.events.append((event, str(arguments)[:200]))

    def __enter__(self):
        self.armed, self.events = True, []

    def __exit__(self, *exception):
        self.armed = False


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    """Armed when every import has been done, which executes modules."""
    for name, save in SAVERS.items():
        path = tmp_path_factory.mktemp("warm") / name
        save({"w": torch.ones(2)}, path)
        open_weights(path)
    for codec in ("cp437", "raw_unicode_escape"):  # of zip entries' names and of old pickles' text
        codecs.lookup(codec)
    return Audit()


def test_the_audit_sees_payloads(tmp_path, audit):
    import pickle

    path = HOSTILE["builtins_exec"].build(tmp_path)
    code = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
    with audit:
        pickle.loads(code)
    assert {event for event, _ in audit.events} >= {"pickle.find_class", "compile", "exec"}
    assert (tmp_path / CANARY).exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path, audit, name):
    path = HOSTILE[name].build(tmp_path)
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with audit, pytest.raises(ConvertError, match=HOSTILE[name].expected) as error:
        open_weights(path)
    assert time.perf_counter() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000, "kB"
    assert audit.events == [] and not (tmp_path / CANARY).exists(), "nothing was executed"
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 1000
    assert isinstance(error.value, InputError) and error.value.exit_code == 2


def test_there_are_many_kinds_of_hostile_files():
    assert len(HOSTILE) > 100


def small_zip(folder: Path, rng: random.Random) -> Path:
    save_zip({"model": {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, "step": 1}, folder / "w.pt")
    return folder / "w.pt"


def small_legacy(folder: Path, rng: random.Random) -> Path:
    save_legacy({"model": {"a": torch.ones(2, 3), "b": torch.ones(4)[1:]}, "step": 1}, folder / "w.pt")
    return folder / "w.pt"


def small_safetensors(folder: Path, rng: random.Random) -> Path:
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors"


def small_index(folder: Path, rng: random.Random) -> Path:
    shards(folder, safe=True)
    return folder / "model.safetensors.index.json"


def mutated(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    kind = rng.choice(["bits", "bits", "bytes", "cut", "repeat", "drop"])
    if kind == "cut":
        return bytes(changed[: rng.randrange(len(changed))])
    if kind in ("repeat", "drop"):
        start = rng.randrange(len(changed))
        part = changed[start : start + rng.randint(1, 40)]
        changed[start : start + len(part)] = part * 2 if kind == "repeat" else b""
        return bytes(changed)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(changed))
        changed[at] = changed[at] ^ 1 << rng.randrange(8) if kind == "bits" else rng.choice(b"\0\xff().}0q9R-a/\"'")
    return bytes(changed)


@pytest.mark.parametrize("build", [small_zip, small_legacy, small_safetensors, small_index])
def test_mutated_files_are_read_or_refused(tmp_path, audit, build):
    rng = random.Random(build.__name__)
    path = build(tmp_path, rng)
    content = path.read_bytes()
    refused = 0
    for _ in range(int(os.environ.get("MUTATIONS", "300"))):
        path.write_bytes(mutated(content, rng))
        with audit:
            try:
                with open_weights(path) as weights:
                    for array in weights.values():
                        array.tobytes()
            except ConvertError as error:
                refused += 1
                assert str(tmp_path) in str(error) and "\n" not in str(error)
        assert audit.events == []
    assert refused > 100


def test_old_torch_is_refused(tmp_path, monkeypatch):
    save_zip({"w": torch.ones(2)}, tmp_path / "w.pt")
    for version in ("2.5.1", "1.13.1+cu117"):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(ConvertError, match=rf"w\.pt: got torch {re.escape(version)}.*expected at least 2\.6"):
            open_weights(tmp_path / "w.pt")
    monkeypatch.setattr(torch, "__version__", "2.10.0a0+git123")
    assert list(open_weights(tmp_path / "w.pt")) == ["w"]


@pytest.mark.parametrize("package", ["torch", "safetensors"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    SAVERS["zip" if package == "torch" else "safetensors"]({"w": torch.ones(2)}, tmp_path / "w")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConvertError, match=rf"w: reading it needs {package}; run pip install"):
        open_weights(tmp_path / "w")


def test_torch_load_is_called_once_and_nothing_else_unpickles():
    root = Path(__file__).parents[2]
    sources = [
        *root.glob("*.py"),
        *(path for name in ("ml_mamba_jax", "pallas_kernels") for path in root.glob(f"{name}/**/*.py")),
    ]
    loads = []
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
                assert not names & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}, path
            if isinstance(node, ast.Call):
                function = ast.unparse(node.func)
                options = {option.arg: ast.unparse(option.value) for option in node.keywords}
                assert function not in ("eval", "exec", "__import__"), path
                assert not {"allow_pickle", "trust_remote_code"} & options.keys(), path
                if function.startswith("torch.") and function.endswith("load"):
                    loads.append((path.name, function, options["weights_only"]))
    assert loads == [("torch_files.py", "torch.load", "True")]
