"""`from ml_mamba_jax import generate`: the same object in whatever order modules are imported."""

import subprocess
import sys
from pathlib import Path

import pytest

import ml_mamba_jax


def test_no_public_name_is_a_module():
    """Importing a module puts it on the package under its name, in the place of a public name that is the same."""
    folder = Path(ml_mamba_jax.__file__).parent
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert len(modules) > 10 and not modules & set(ml_mamba_jax.__all__)


@pytest.mark.parametrize(
    "first",
    [
        "import ml_mamba_jax.generation, ml_mamba_jax.checkpoint, ml_mamba_jax.chat",
        "from ml_mamba_jax import chat, generation, generate",
        "from ml_mamba_jax import *",
    ],
)
def test_the_name_is_the_function_whatever_was_imported_before(first):
    script = f"""
{first}
import ml_mamba_jax
from ml_mamba_jax import generate, load, stream
import ml_mamba_jax.generation, ml_mamba_jax.chat
for name, function in dict(generate=generate, stream=stream, load=load).items():
    assert type(function).__name__ == "function" and function.__name__ == name, function
    assert getattr(ml_mamba_jax, name) is function
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_names_are_listed_and_unknown_ones_refused():
    assert set(ml_mamba_jax.__all__) <= set(dir(ml_mamba_jax))
    assert {"MLMamba", "MLMambaConfig", "MambaState", "Tokenizer", "Sampling", "Chat"} <= set(ml_mamba_jax.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'genrate'; it has .*generate"):
        ml_mamba_jax.genrate  # noqa: B018
    with pytest.raises(ImportError, match="genrate"):
        from ml_mamba_jax import genrate  # noqa: F401


def test_the_version_is_that_of_the_package():
    import importlib.metadata

    assert ml_mamba_jax.__version__ == importlib.metadata.version("ml-mamba-jax")
