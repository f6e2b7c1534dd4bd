"""The layers of the repository: who may import whom, where heavy packages may appear, what files may not be called.

Read from the source, so that a file nobody imports yet is checked too. Rules go by folder and file name.
"""

import ast
import dataclasses
import sys
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("pallas_kernels", "ml_mamba_jax", "configs", "benchmarks", "examples", "tests")
SCRIPTS = ("train.py", "convert_torch.py")

FOUNDATION = {"config", "errors", "names", "serialize", "typing"}
MODEL_SIDE = {"attention", "layers", "mamba2", "vit", "vision", "scan2d", "projector", "connector", "model"}
INPUTS = {"image", "prompt", "tokenizer"}

# What ml_mamba_jax.data may import from its own package. No model code: data loading needs no accelerator.
DATA_MAY_IMPORT = {"config", "errors", "image", "names", "prompt", "tokenizer"}

# The order of layers; a file imports from its own layer or from a lower one.
LAYERS = ("pallas_kernels", "foundation", "inputs", "model", "use", "data", "training", "configs", "scripts")


@dataclasses.dataclass(frozen=True)
class Heavy:
    """Where a heavy package may be imported: under the paths `where`, and whether only inside functions."""

    where: tuple[str, ...]
    lazily: bool = False


CONVERT, DATA, TRAINING = "ml_mamba_jax/convert/", "ml_mamba_jax/data/", "ml_mamba_jax/training/"
HEAVY = {
    "torch": Heavy((CONVERT, "benchmarks/"), lazily=True),
    "transformers": Heavy((CONVERT,), lazily=True),
    "safetensors": Heavy((CONVERT, "ml_mamba_jax/checkpoint.py", "ml_mamba_jax/state_file.py"), lazily=True),
    "grain": Heavy((DATA, TRAINING)),
    "tensorflow_datasets": Heavy((DATA,)),
    "array_record": Heavy((DATA,)),
    "tensorflow": Heavy(()),
    "sklearn": Heavy((DATA,), lazily=True),
    "optax": Heavy((TRAINING, "ml_mamba_jax/lora.py", "configs/", "train.py")),
    "orbax": Heavy(("ml_mamba_jax/checkpoint.py", TRAINING)),
    "tensorboardX": Heavy((TRAINING,), lazily=True),
    "wandb": Heavy((TRAINING,), lazily=True),
    "matplotlib": Heavy((TRAINING, "examples/"), lazily=True),
    "tyro": Heavy(
        ("train.py", "convert_torch.py", "configs/", TRAINING, "ml_mamba_jax/chat.py", "ml_mamba_jax/info.py")
    ),
    "jax_triton": Heavy(("pallas_kernels/",)),
    "triton": Heavy(("pallas_kernels/", "benchmarks/triton_conv.py")),
}
KERNELS_MAY_IMPORT = {"jax", "jaxtyping", "numpy", "pallas_kernels"}
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}


@dataclasses.dataclass(frozen=True)
class Import:
    module: str
    line: int
    lazy: bool
    """Inside a function, or for type checkers only."""

    @property
    def top(self) -> str:
        return self.module.split(".")[0]


def imports_of(source: str) -> list[Import]:
    """Every import of a file, `from package import module` as package.module."""
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import, expected an absolute one"
            found.extend(Import(f"{node.module}.{alias.name}", node.lineno, lazy) for alias in node.names)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        types_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            visit(child, lazy or inside or types_only)

    visit(ast.parse(source), False)
    return found


def layer(module: str) -> str | None:
    """The layer of a module: `ml_mamba_jax.vit.ViT` -> "model". None for the lazy package itself and foreign ones."""
    first, *rest = module.split(".")
    if first in ("pallas_kernels", "configs"):
        return first
    if first in ("train", "convert_torch"):
        return "scripts"
    if first != "ml_mamba_jax" or not rest:
        return None
    if rest[0] in ("data", "training"):
        return rest[0]
    if rest[0] in FOUNDATION:
        return "foundation"
    if rest[0] in INPUTS:
        return "inputs"
    return "model" if rest[0] in MODEL_SIDE | {"quantization", "state"} else "use"


def problems(path: str, source: str) -> list[str]:
    """What a file at `path`, relative to the root, does against the rules."""
    own_path = PurePosixPath(path)
    own_module = ".".join(own_path.with_suffix("").parts)
    own_layer, in_tests = layer(own_module), own_path.parts[0] == "tests"
    found = []

    def check(condition: bool, problem: str) -> None:
        if not condition:
            found.append(f"{path}:{an_import.line}: imports {an_import.module}: {problem}")

    for an_import in imports_of(source):
        imported_layer, top = layer(an_import.module), an_import.top
        if imported_layer == "scripts":
            check(in_tests, "only tests import a script")
        if in_tests:
            continue
        if own_layer == "pallas_kernels":
            allowed = top in KERNELS_MAY_IMPORT or top in HEAVY or top in sys.stdlib_module_names
            check(allowed, "kernels depend on jax, numpy and jaxtyping only")
        if own_layer and imported_layer and own_module != "ml_mamba_jax.__init__":
            downwards = LAYERS.index(imported_layer) <= LAYERS.index(own_layer)
            check(downwards, f"{own_layer} stands below {imported_layer}")
        if own_layer == "data" and top in ("ml_mamba_jax", "pallas_kernels") and imported_layer != "data":
            inner = an_import.module.split(".")[1:2]
            check(top == "ml_mamba_jax" and set(inner) <= DATA_MAY_IMPORT, "data never imports model code")
        if own_layer not in ("training", "configs", "scripts", "data", None):
            check(imported_layer != "data", f"{own_layer} does not load data")
        if top in HEAVY:
            heavy = HEAVY[top]
            check(
                path.startswith(heavy.where) if heavy.where else False, f"expected only in {heavy.where or 'no file'}"
            )
            top_level = (
                an_import.lazy or not heavy.lazily or own_path.parts[0] == "examples"
            )  # a notebook is read downwards
            check(top_level, "expected inside the function that needs it")

    for part in own_path.with_suffix("").parts:
        if part in BANNED_NAMES or part.startswith("base_"):
            found.append(f"{path}: {part!r} names no concept")
    return found


def sources() -> list[Path]:
    folders = [path for name in SOURCES for path in sorted((ROOT / name).rglob("*.py"))]
    return folders + [ROOT / name for name in SCRIPTS if (ROOT / name).exists()]


@pytest.mark.parametrize("path", [str(p.relative_to(ROOT).as_posix()) for p in sources()])
def test_layering(path):
    assert problems(path, (ROOT / path).read_text()) == []


def test_the_sources_are_found():
    names = {p.relative_to(ROOT).as_posix() for p in sources()}
    assert {"pallas_kernels/ssd/xla.py", "ml_mamba_jax/model.py", "tests/test_layering.py"} <= names


def test_model_side_is_short():
    files = [ROOT / "ml_mamba_jax" / f"{name}.py" for name in sorted(MODEL_SIDE)]
    assert sum(len(file.read_text().splitlines()) for file in files) <= 1500


@pytest.mark.parametrize(
    "path, source, problem",
    [
        ("pallas_kernels/ssd/xla.py", "import flax.linen as nn", "kernels depend on jax"),
        ("pallas_kernels/dispatch.py", "def f():\n    from ml_mamba_jax import config", "kernels depend on jax"),
        ("ml_mamba_jax/mamba2.py", "from ml_mamba_jax.data import loader", "model stands below data"),
        ("ml_mamba_jax/mamba2.py", "import ml_mamba_jax.training.step", "model stands below training"),
        ("ml_mamba_jax/vit.py", "from ml_mamba_jax import generation", "model stands below use"),
        ("ml_mamba_jax/generation.py", "from ml_mamba_jax.data.records import Record", "use stands below data"),
        ("ml_mamba_jax/checkpoint.py", "from ml_mamba_jax.training import state", "use stands below training"),
        ("ml_mamba_jax/training/step.py", "import configs.demo", "training stands below configs"),
        ("ml_mamba_jax/data/loader.py", "from ml_mamba_jax.model import MLMamba", "data never imports model code"),
        ("ml_mamba_jax/data/loader.py", "from ml_mamba_jax import mamba2", "data never imports model code"),
        ("ml_mamba_jax/data/loader.py", "import pallas_kernels", "data never imports model code"),
        ("ml_mamba_jax/data/loader.py", "from ml_mamba_jax import MLMambaConfig", "data never imports model code"),
        ("configs/demo.py", "import train", "only tests import a script"),
        ("ml_mamba_jax/convert/keys.py", "def f():\n    import convert_torch", "only tests import a script"),
        ("ml_mamba_jax/convert/keys.py", "import torch", "inside the function"),
        (
            "ml_mamba_jax/convert/keys.py",
            "try:\n    import torch\nfinally:\n    pass",
            "inside the function",
        ),
        ("ml_mamba_jax/tokenizer.py", "def f():\n    import transformers", "expected only in"),
        ("ml_mamba_jax/model.py", "import optax", "expected only in"),
        ("ml_mamba_jax/training/writers.py", "import wandb", "inside the function"),
        ("ml_mamba_jax/training/plots.py", "from matplotlib import pyplot", "inside the function"),
        ("ml_mamba_jax/data/source.py", "import tensorflow as tf", "expected only in no file"),
        ("train.py", "import grain", "expected only in"),
        ("ml_mamba_jax/utils.py", "", "'utils' names no concept"),
        ("tests/helpers/run.py", "", "'helpers' names no concept"),
        ("ml_mamba_jax/base_model.py", "", "'base_model' names no concept"),
    ],
)
def test_problems_are_found(path, source, problem):
    assert any(problem in found for found in problems(path, source)), problems(path, source)


@pytest.mark.parametrize(
    "path, source",
    [
        ("pallas_kernels/ssd/triton.py", "import functools\nimport jax_triton\nfrom jax import lax"),
        ("ml_mamba_jax/convert/keys.py", "def f():\n    import torch"),
        ("ml_mamba_jax/convert/keys.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        (
            "ml_mamba_jax/data/loader.py",
            "import grain\nfrom ml_mamba_jax import prompt\nimport ml_mamba_jax.data.records",
        ),
        ("train.py", "from ml_mamba_jax.data import loader\nimport configs\nimport tyro"),
        ("tests/test_train.py", "import torch\nimport train"),
        ("ml_mamba_jax/__init__.py", "def __getattr__(name):\n    from ml_mamba_jax.training import step"),
    ],
)
def test_what_is_allowed(path, source):
    assert problems(path, source) == []
