"""Starting from parameters that exist: of converted weights, or of another run, part by part."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from ml_mamba_jax import checkpoint, lora, processes, serialize
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.tokenizer import FILE_NAME as TOKENIZER_FILE
from ml_mamba_jax.training.config import TrainConfig

FOR_RANDOM_WEIGHTS = ("dt_range", "A_range", "embedding_std", "chunk_size")
"""Fields of a config that say nothing about parameters which exist."""
INPUT_FIELDS = ("prompt_format", "resize")
"""Fields of a model's config that change what it is shown, but none of its parameters."""
OF_A_RUN = ("dtype", "param_dtype", "lora_rank", "lora_alpha")
"""Fields of a model's config that a run chooses, whatever model it starts from."""


def with_model_of_init(config: TrainConfig, preset: MLMambaConfig) -> TrainConfig:
    """The recipe with the model of the last whole one among `init`, if it asks for that. Dtypes and LoRA stay the recipe's.

    Args:
        preset: the recipe's model before options changed it; what they changed is what the user asks for.

    Raises:
        InputError: options that ask for another architecture.
    """
    whole = [folder for folder in config.init if (c := checkpoint.load_config(folder)).language and c.connector]
    if not config.model_of_init or not whole:
        return config
    mine, theirs = config.model, checkpoint.load_config(whole[-1])
    asked = serialize.differences(preset, mine)
    if other := [line for line in asked if line.split(":")[0].split(".")[-1] not in (*OF_A_RUN, *INPUT_FIELDS)]:
        raise InputError(
            f"model: got {'; '.join(other)}, expected the model of {whole[-1]} as it is; pass --no-model-of-init to begin "
            "with parts of it"
        )
    inputs = {
        name: getattr(mine if getattr(mine, name) != getattr(preset, name) else theirs, name) for name in INPUT_FIELDS
    }
    language = dataclasses.replace(
        theirs.language, lora_rank=mine.language.lora_rank, lora_alpha=mine.language.lora_alpha
    )
    model = theirs.replace(language=language, dtype=mine.dtype, param_dtype=mine.param_dtype, **inputs)
    return dataclasses.replace(config, model=model)


def start_from(folders: Sequence[Path], config: MLMambaConfig, params: dict) -> tuple[dict, list[str]]:
    """Replace the parts of `params` (language, connector, vision/NAME) that the folders hold; a later folder wins.

    Returns:
        The parameters, each where it was on the mesh and in its dtype, and for every folder lines that say what was taken and
        which `INPUT_FIELDS` of the recipe are not those that it was trained with.

    Raises:
        InputError: a folder that shares no part with the model, or a part of another architecture; lists the fields that differ.
        CheckpointError: a folder without checkpoint, or a damaged one.
    """
    flat, lines = flatten_dict(params, sep="/"), []
    mine = parts(config)
    for folder in folders:
        their_config, missing = checkpoint.load_config(folder), checkpoint.missing_encoders(folder)
        folds = bool(config.language) and config.language.lora is None  # additions of theirs into kernels of ours
        theirs = parts(lora.without(their_config) if folds else their_config)
        shared = [name for name in theirs if name in mine and name.removeprefix("vision/") not in missing]
        if not shared:
            raise InputError(
                f"init: {folder} holds {', '.join(theirs)}, expected at least one of {', '.join(mine)} of the recipe's model"
            )
        for name in shared:
            _check_alike(folder, name, theirs[name], mine[name])
        loaded = checkpoint.load_params(folder, without_encoders=True)
        found = flatten_dict(lora.merge(loaded, their_config)[0] if folds else loaded, sep="/")
        for path, array in found.items():
            if path.startswith(tuple(f"{name}/" for name in shared)):
                flat[path] = processes.place(array.astype(flat[path].dtype), flat[path].sharding)
        lines.append(f"{', '.join(shared)} from {folder}")
        lines += [f"{folder} was trained with another {line}" for line in _other_inputs(their_config, config)]
    return unflatten_dict(flat, sep="/"), lines


def check_given(config: TrainConfig) -> None:
    """Raise InputError where the language model or an encoder would start from random numbers without being asked to, and where
    a language model would get another tokenizer than the one that its embeddings belong to."""
    given: set[str] = set()
    for folder in config.init:
        missing = checkpoint.missing_encoders(folder)
        given |= {name for name in parts(checkpoint.load_config(folder)) if name.removeprefix("vision/") not in missing}
    random = [name for name in parts(config.model) if name != "connector" and name not in given]
    if random and not config.from_scratch:
        raise InputError(
            f"init: got no weights for {', '.join(random)}, expected folders that hold them: pass --init FOLDER ... with "
            "converted weights or runs (convert_torch.py makes them), or --from-scratch to train them from random numbers"
        )
    if "language" in given and config.tokenizer is None and tokenizer_of(config.init) is None:
        raise InputError(
            f"tokenizer: got none beside the language model of {', '.join(map(str, config.init))}, expected the one that it was "
            f"trained with: pass --tokenizer (of Mamba-2's models: EleutherAI/gpt-neox-20b), or put its {TOKENIZER_FILE} there"
        )


def tokenizer_of(folders: Sequence[Path]) -> Path | None:
    """The tokenizer of the last folder that has a language model and a tokenizer."""
    for folder in reversed(folders):
        if "language" in parts(checkpoint.load_config(folder)) and (folder / TOKENIZER_FILE).is_file():
            return folder
    return None


def parts(config: MLMambaConfig) -> dict[str, Any]:
    """The configs of the parts of a model, by the path of their parameters."""
    found = {"language": config.language, "connector": config.connector}
    found |= {f"vision/{encoder.name}": encoder for encoder in config.vision}
    return {name: part for name, part in found.items() if part is not None}


def _other_inputs(theirs: MLMambaConfig, mine: MLMambaConfig) -> list[str]:
    """Of what was trained as a whole; converted parts have seen neither prompts nor images of ours."""
    if not (theirs.language and theirs.connector):
        return []
    return [
        f"{name}: {getattr(theirs, name)}, here {getattr(mine, name)}"
        for name in INPUT_FIELDS
        if getattr(theirs, name) != getattr(mine, name)
    ]


def _check_alike(folder: Path, name: str, theirs: Any, mine: Any) -> None:
    changed = [line for line in serialize.differences(theirs, mine) if not _is_for_random_weights(line, theirs, mine)]
    if changed:
        raise InputError(f"init: {folder}: its {name} is another one than the recipe's: {'; '.join(changed)}")


def _is_for_random_weights(line: str, theirs: Any, mine: Any) -> bool:
    field = line.split(":")[0].split(".")
    if field[-1] in ("lora_rank", "lora_alpha"):  # kernels without additions fit a model that begins with some
        return theirs.lora is None
    if field[-1] == "layer_scale":  # whether there is one matters, its initial value does not
        return (theirs.layer_scale is None) == (mine.layer_scale is None)
    return any(part in FOR_RANDOM_WEIGHTS for part in field)
