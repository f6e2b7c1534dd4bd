"""A recurrent state on disk: one safetensors file that knows which model it belongs to."""

import contextlib
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ml_mamba_jax import serialize
from ml_mamba_jax.config import Mamba2Config, MLMambaConfig
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.state import MambaState, check_state

FORMAT = "ml-mamba-jax state 1"


def save_state(path: str | Path, state: MambaState, config: MLMambaConfig, params: dict | None = None) -> None:
    """Write a state that a model of `config` has reached, whole or not at all.

    Args:
        params: the parameters that it was reached with. The file then holds a fingerprint of those of the language model.

    Raises:
        InputError: a state of another model, or a folder that cannot be written to.
    """
    from safetensors.numpy import save

    _check_config(config)
    check_state(state, config.language, config.dtype, state.batch_size)
    arrays = {name: np.asarray(a, np.float32) for name, a in state._asdict().items()}  # which holds 16 bits exactly
    metadata = {
        "format": FORMAT,
        "language": serialize.to_json(config.language),
        "dtype": config.dtype,
    }
    if params is not None:
        metadata["params"] = fingerprint(params)
    metadata["sha256"] = _digest(arrays, metadata)
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_bytes(save(arrays, metadata))
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise InputError(f"{path}: the state cannot be written: {error}; choose another place") from error


def load_state(path: str | Path, config: MLMambaConfig, params: dict | None = None) -> MambaState:
    """The state in a file of `save_state`, for a model of `config`.

    Args:
        params: those to go on with. Without them a state that other parameters of the same config have reached is read
            like any other, and means nothing to the model.

    Raises:
        InputError: no such file, a damaged one, or one of a model with another language config or compute dtype (names
            the fields that differ) or other parameters.
    """
    _check_config(config)
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = Path(path)
    try:
        data = path.read_bytes()
        arrays, metadata = load(data), _metadata(data)
        saved = serialize.from_json(Mamba2Config, metadata["language"], f"{path}: language")
        dtype, digest = metadata["dtype"], metadata["sha256"]
        if metadata["format"] != FORMAT:
            raise ValueError(metadata["format"])
    except FileNotFoundError as error:
        raise InputError(f"{path}: found no such file, expected one that save_state wrote; check the path") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: got no file of save_state, or a damaged one; save the state again") from error
    differences = serialize.differences(saved, config.language)
    if dtype != config.dtype:
        differences.append(f"dtype: {dtype} -> {config.dtype}")
    if differences:
        raise InputError(f"{path}: got the state of another model ({'; '.join(differences)}); load it into that one")
    if arrays.keys() != set(MambaState._fields) or _digest(arrays, metadata) != digest:
        raise InputError(f"{path}: the contents differ from their SHA-256: the file is damaged; save the state again")
    if params is not None and metadata.get("params") != fingerprint(params):
        raise InputError(
            f"{path}: got a state that other parameters reached, or that was saved without params; expected one of these "
            "parameters; save it with them"
        )
    return MambaState(conv=jnp.asarray(arrays["conv"], config.dtype), ssm=jnp.asarray(arrays["ssm"]))


def fingerprint(params: dict) -> str:
    """SHA-256 over names, shapes, dtypes and a few values of all parameters of the language model. Training changes it, and
    so does `quantize`."""
    leaves = {jax.tree_util.keystr(path): a for path, a in jax.tree.leaves_with_path(params["language"])}
    digest = hashlib.sha256()
    for name, values in sorted(jax.device_get(_a_few(leaves)).items()):
        digest.update(f"{name} {values.dtype} {leaves[name].shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


@jax.jit
def _a_few(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Values of each array, at places as far from each other as possible."""

    def few(a):
        flat = np.linspace(0, a.size - 1, min(a.size, 64)).astype(np.int64)
        return a[tuple(i.astype(np.int32) for i in np.unravel_index(flat, a.shape))]

    return {name: few(a) for name, a in leaves.items()}


def _check_config(config: MLMambaConfig) -> None:
    if not isinstance(config, MLMambaConfig) or config.language is None:
        raise InputError(
            f"config: got {type(config).__name__}, expected an MLMambaConfig with a language part; pass model.config"
        )


def _metadata(data: bytes) -> dict[str, str]:
    """That of a safetensors file: JSON behind its length in 8 bytes."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def _digest(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(metadata.get("params", "").encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
