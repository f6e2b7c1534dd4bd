"""A recurrent state on disk: one safetensors file that knows which model it belongs to."""

import contextlib
import hashlib
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ml_mamba_jax import serialize
from ml_mamba_jax.config import Mamba2Config, MLMambaConfig
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.state import MambaState, check_state

FORMAT = "ml-mamba-jax state 1"


def save_state(path: str | Path, state: MambaState, config: MLMambaConfig) -> None:
    """Write a state that a model of `config` has reached, whole or not at all.

    Raises:
        InputError: a state of another model, or a folder that cannot be written to.
    """
    from safetensors.numpy import save

    check_state(state, config.language, config.dtype, state.batch_size)
    arrays = {name: np.asarray(a, np.float32) for name, a in state._asdict().items()}  # which holds 16 bits exactly
    metadata = {
        "format": FORMAT,
        "language": serialize.to_json(config.language),
        "dtype": config.dtype,
        "sha256": _digest(arrays),
    }
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_bytes(save(arrays, metadata))
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise InputError(f"{path}: the state cannot be written: {error}; choose another place") from error


def load_state(path: str | Path, config: MLMambaConfig) -> MambaState:
    """The state in a file of `save_state`, for a model of `config`.

    Raises:
        InputError: no such file, a damaged one, or one of a model with another language config or compute dtype; names
            the fields that differ.
    """
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
    if arrays.keys() != set(MambaState._fields) or _digest(arrays) != digest:
        raise InputError(f"{path}: the arrays differ from their SHA-256: the file is damaged; save the state again")
    return MambaState(conv=jnp.asarray(arrays["conv"], config.dtype), ssm=jnp.asarray(arrays["ssm"]))


def _metadata(data: bytes) -> dict[str, str]:
    """That of a safetensors file: JSON behind its length in 8 bytes."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
