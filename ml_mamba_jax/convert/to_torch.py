"""A folder of ours -> PyTorch weights, by the same tables read backwards."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict

from ml_mamba_jax import checkpoint, serialize
from ml_mamba_jax.config import LANGUAGE_MODELS, VISION_BACKBONES, MLMambaConfig
from ml_mamba_jax.convert import tables
from ml_mamba_jax.convert.families import OWN_CONFIG
from ml_mamba_jax.convert.pieces import Piece, by_key, torch_shape
from ml_mamba_jax.convert.report import tensors as pieces_table
from ml_mamba_jax.convert.source import CONFIG_FILE, ENCODERS_FOLDER, RUN_CHECKPOINT
from ml_mamba_jax.convert.to_jax import aside, check_absent
from ml_mamba_jax.errors import CheckpointError, ConvertError
from ml_mamba_jax.names import unknown
from ml_mamba_jax.tokenizer import FILE_NAME as TOKENIZER_FILE

Form = Literal["hf-mamba2", "timm-vit", "ml-mamba"]
SHARD_BYTES = 10**9
"""Files of safetensors are about this large at most: so much memory is needed besides the parameters."""

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class Tensor(NamedTuple):
    """One tensor to write: how to make it, and what it will be."""

    key: str
    pieces: list[Piece]
    shape: tuple[int, ...]
    dtype: np.dtype
    stored_once: bool = False
    """With the tensor that it is tied to, as in the weights it came from."""

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def default_form(config: MLMambaConfig) -> Form:
    """What a folder is written as when nobody says: the form of what it holds."""
    if config.language is None:
        return "timm-vit"
    return "hf-mamba2" if config.connector is None else "ml-mamba"


class Export(NamedTuple):
    """What is to be written: the tensors of each file or folder by its path inside the output."""

    folder: Path
    config: MLMambaConfig
    form: Form
    params: checkpoint.ParamsOnDisk
    tensors: dict[str, list[Tensor]]

    @property
    def summary(self) -> str:
        every = [tensor for tensors in self.tensors.values() for tensor in tensors]
        n_bytes = sum(tensor.nbytes for tensor in every)
        return f"{self.folder} as {self.form}: {len(every)} tensors, {n_bytes / 1e9:.2f} GB"

    def describe(self) -> str:
        """The tensors, one line for each kind."""
        lines = [self.summary]
        for place, tensors in self.tensors.items():
            lines += [f"\n{place}", pieces_table((t.key, t.shape, t.dtype, t.pieces) for t in tensors)]
        return "\n".join(lines)


def open_export(folder: Path, form: Form | None = None, dtype: str | None = None) -> Export:
    """The newest checkpoint of `folder` as PyTorch weights.

    hf-mamba2 is the language model for transformers; timm-vit one safetensors file per encoder; ml-mamba a run of ML-Mamba:
    config.json and checkpoints/latest-checkpoint.pt, with the encoders in files of their own beside it.

    Args:
        dtype: of all tensors. Default: that of each tensor in the weights that `folder` was converted from, else the folder's.

    Raises:
        ConvertError: a form that the folder has no parts for. CheckpointError: a folder that is no checkpoint.
    """
    config = checkpoint.load_config(folder)
    form = form or default_form(config)
    _check_parts(config, form, folder)
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    params, originals = checkpoint.ParamsOnDisk(folder), _originals(folder)
    tensors = {
        place: _tensors(pieces, params, originals, dtype) for place, pieces in _tables(config, form, params).items()
    }
    return Export(folder, config, form, params, tensors)


def write(export: Export, out: Path, *, progress: bool = False) -> list[Path]:
    """Write the weights into `out`, whole or not at all, and return the files. `progress`: show a bar on stderr."""
    check_absent(out)
    with aside(out) as target:
        for place, tensors in export.tensors.items():
            if place == str(RUN_CHECKPOINT):
                _write_torch(tensors, export.params, target / place, progress)
                beside = target
            else:
                _write_safetensors(tensors, export.params, target / place, progress)
                beside = target / place
            config = _config_of(export.config, export.form, place)
            serialize.write_text(beside / CONFIG_FILE, _as_text(config))
        tokenizer = export.folder / TOKENIZER_FILE
        if tokenizer.is_file() and export.form != "timm-vit":
            shutil.copyfile(tokenizer, target / TOKENIZER_FILE)
        written = [path.relative_to(target) for path in sorted(target.rglob("*")) if path.is_file()]
    return [out / path for path in written]


def parts(out: Path) -> list[Path]:
    """What `write` wrote, as `open_source` takes it."""
    return [out] if (out / CONFIG_FILE).is_file() else sorted((out / ENCODERS_FOLDER).glob("*"))


def _tables(config: MLMambaConfig, form: Form, params: checkpoint.ParamsOnDisk) -> dict[str, list[Piece]]:
    """The pieces of each file or folder that is written, by its path inside `out`."""
    if form == "hf-mamba2":
        return {".": [piece for piece in tables.mamba2(config.language, embedding="embeddings") if not piece.tied]}
    found = {str(RUN_CHECKPOINT): tables.ml_mamba(config)} if form == "ml-mamba" else {}
    for encoder in config.vision:
        if f"vision/{encoder.name}/pos_embed" in params:
            # An encoder alone is the folder; those of a run stand beside its checkpoint, which never holds them.
            alone = form == "timm-vit" and len(config.vision) == 1
            found["." if alone else f"{ENCODERS_FOLDER}/{encoder.name}"] = tables.timm_vit(encoder)
    return found


def _config_of(config: MLMambaConfig, form: Form, place: str) -> dict:
    """The config.json beside the weights at `place`."""
    if form == "hf-mamba2":
        return _hf_mamba2_config(config)
    if place == str(RUN_CHECKPOINT):
        return run_config(config)
    name = place.split("/")[-1]
    encoders = [encoder for encoder in config.vision if name in (".", encoder.name)]
    return {OWN_CONFIG: serialize.plain(config.replace(language=None, connector=None, vision=tuple(encoders)))}


def _check_parts(config: MLMambaConfig, form: Form, folder: Path) -> None:
    if config.language is not None and config.language.lora is not None:
        raise ConvertError(
            f"{folder}: got a model with low-rank additions, which no form has; fold them first: "
            f"python -m ml_mamba_jax.lora {folder} OUT"
        )
    if form not in get_args(Form):
        raise unknown("form", form, get_args(Form))
    needed = {
        "hf-mamba2": ("language",),
        "timm-vit": ("vision",),
        "ml-mamba": ("language", "connector"),
    }[form]
    if absent := [part for part in needed if not getattr(config, part)]:
        raise ConvertError(f"{folder}: holds no {' and no '.join(absent)}, which {form} needs; choose another form")
    if form == "timm-vit" and len(checkpoint.missing_encoders(folder)) == len(config.vision):
        raise ConvertError(f"{folder}: was converted without its encoders, which {form} needs; choose another form")
    if form == "hf-mamba2" and config.language.mixer.norm_before_gate:
        raise ConvertError(f"{folder}: normalises before the gate, which {form} cannot; choose another form")


class Original(NamedTuple):
    """Of a tensor in the weights that a folder was converted from."""

    position: int
    dtype: str
    stored_once: bool


def _originals(folder: Path) -> dict[tuple[str, bool], Original]:
    """By what the tensor fills, and whether it is tied: its name may be another in another form."""
    record = folder / checkpoint.CONVERSION_FILE
    if not record.is_file():
        return {}
    try:
        tensors = json.loads(record.read_text(encoding="utf-8"))["tensors"]
        return {
            (tensor["parameter"], "tied" in tensor["transform"]): Original(i, tensor["dtype"], "stored" in tensor)
            for i, tensor in enumerate(tensors)
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{record}: the record of the conversion is damaged; remove it to do without") from error


def _tensors(
    pieces: Iterable[Piece],
    params: checkpoint.ParamsOnDisk,
    originals: dict[tuple[str, bool], Original],
    dtype: str | None,
) -> list[Tensor]:
    """The tensors of a table as they came, or in the order of the table where they never came from PyTorch."""
    tensors = []
    of_parameter: dict[str, set[str]] = {}  # for tensors that were others: three that have become one
    for (where, _), original in originals.items():
        of_parameter.setdefault(where.partition("[")[0], set()).add(original.dtype)
    for key, parts in by_key(pieces).items():
        shapes = {piece.path: tuple(params.shapes[piece.path].shape) for piece in parts}
        own = np.dtype(params.shapes[parts[0].path].dtype)
        original = originals.get((parts[0].where, parts[0].tied))
        theirs = {original.dtype} if original else of_parameter.get(parts[0].path, set())
        chosen = DTYPES[dtype] if dtype else DTYPES.get(min(theirs), own) if len(theirs) == 1 else own
        position = original.position if original else len(originals)
        once = bool(original and original.stored_once and parts[0].tied)
        tensors.append((position, Tensor(key, parts, torch_shape(parts, shapes), chosen, once)))
    return [tensor for _, tensor in sorted(tensors, key=lambda item: item[0])]


def _made(
    tensors: list[Tensor], params: checkpoint.ParamsOnDisk, progress: bool
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Each tensor as a contiguous array, those of one parameter after the other: one parameter is in memory at a time."""
    from tqdm import tqdm

    at_hand: dict[str, np.ndarray] = {}
    total = sum(tensor.nbytes for tensor in tensors)
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=not progress) as bar:
        for tensor in _by_parameter(tensors):
            paths = {piece.path for piece in tensor.pieces}
            for path in at_hand.keys() - paths:
                del at_hand[path]
            at_hand |= {path: params[path] for path in paths - at_hand.keys()}
            made = np.empty(tensor.shape, tensor.dtype)
            for piece in tensor.pieces:
                with np.errstate(over="ignore"):  # told below
                    made[piece.source] = piece.layout.to_torch(piece.region(at_hand[piece.path]))
            if not np.isfinite(made).all():
                raise ConvertError(f"{tensor.key}: NaN or infinity as {made.dtype}; choose another dtype")
            yield tensor, made
            bar.update(tensor.nbytes)


def _by_parameter(tensors: Iterable[Tensor]) -> list[Tensor]:
    return sorted(tensors, key=lambda tensor: tensor.pieces[0].path)


def _write_safetensors(tensors: list[Tensor], params: checkpoint.ParamsOnDisk, folder: Path, progress: bool) -> None:
    """model.safetensors, or several shards and their index, as transformers reads them."""
    from safetensors.numpy import save_file

    shards: list[list[Tensor]] = [[]]
    for tensor in _by_parameter(tensors):
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    folder.mkdir(parents=True, exist_ok=True)
    index = {}
    made = _made(tensors, params, progress)
    for i, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        arrays = {tensor.key: array for _, (tensor, array) in zip(shard, made, strict=False)}
        save_file(arrays, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(arrays, name)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors)
        text = _as_text({"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))})
        serialize.write_text(folder / "model.safetensors.index.json", text)


def _write_torch(tensors: list[Tensor], params: checkpoint.ParamsOnDisk, path: Path, progress: bool) -> None:
    """`{"model": {"llm_backbone": {...}, "mlp": {...}, ...}}`.

    torch.save wants all tensors at once: they are made in a mapped file beside, so that memory does not have to hold them.
    """
    import torch

    path.parent.mkdir(parents=True)
    scratch = path.with_suffix(".scratch")
    own = [tensor for tensor in tensors if not tensor.stored_once]
    total = sum(tensor.nbytes for tensor in own)
    memory, start, arrays = np.memmap(scratch, np.uint8, "w+", shape=total), 0, {}
    for tensor, array in _made(own, params, progress):
        # torch knows no bfloat16 of NumPy.
        dtype = np.dtype(np.int16) if array.dtype == DTYPES["bfloat16"] else array.dtype
        place = memory[start : start + tensor.nbytes].view(dtype).reshape(tensor.shape)
        place[...] = array.view(dtype)
        start += tensor.nbytes
        arrays[tensor.key] = torch.from_numpy(place)
        if dtype != array.dtype:
            arrays[tensor.key] = arrays[tensor.key].view(torch.bfloat16)
    of_parameter = {tensor.pieces[0].path: arrays[tensor.key] for tensor in own}
    arrays |= {tensor.key: of_parameter[tensor.pieces[0].path] for tensor in tensors if tensor.stored_once}
    torch.save(unflatten_dict({tensor.key: arrays[tensor.key] for tensor in tensors}, sep="/"), path)
    scratch.unlink()


def _hf_mamba2_config(config: MLMambaConfig) -> dict:
    language, mixer = config.language, config.language.mixer
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "hidden_size": mixer.d_model,
        "num_heads": mixer.n_heads,
        "head_dim": mixer.head_dim,
        "state_size": mixer.d_state,
        "conv_kernel": mixer.d_conv,
        "expand": mixer.expand,
        "n_groups": mixer.n_groups,
        "norm_before_gate": mixer.norm_before_gate,
        "rms_norm": True,
        "chunk_size": mixer.chunk_size or 256,
        "time_step_limit": list(mixer.dt_limit),
        "num_hidden_layers": language.n_layers,
        "vocab_size": language.padded_vocab_size,
        "layer_norm_epsilon": language.norm_eps,
        "tie_word_embeddings": language.tie_embeddings,
        "residual_in_fp32": language.residual_in_float32,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        OWN_CONFIG: serialize.plain(config.replace(vision=(), connector=None)),
    }


def run_config(config: MLMambaConfig) -> dict:
    """The fields that the reference reads, where its ids have a word for this model; and the whole of our config."""
    language = next((name for name, known in LANGUAGE_MODELS.items() if known == config.language), None)
    vision = next((name for name, known in VISION_BACKBONES.items() if known == config.vision), None)
    return {
        "model": {
            "model_id": "mlmamba+3b",
            "arch_specifier": f"no-align+{config.connector.projector}",
            "llm_backbone_id": language,
            "vision_backbone_id": vision,
            "image_resize_strategy": config.resize,
            "llm_max_length": 2048,
        },
        OWN_CONFIG: serialize.plain(config),
    }


def _as_text(value: dict) -> str:
    return json.dumps(value, indent=2) + "\n"
