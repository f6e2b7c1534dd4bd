"""What is converted: weights of one or several files under the keys of a table, with the config they belong to."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, get_args, get_type_hints

import numpy as np

from ml_mamba_jax.config import VISION_ENCODERS, MLMambaConfig, ViTConfig
from ml_mamba_jax.convert.families import FAMILIES, assumption, detect, prefix_of, read_config, read_text
from ml_mamba_jax.convert.pieces import Piece
from ml_mamba_jax.convert.weight_files import IN_FOLDERS, INDEX_SUFFIX, TensorInfo, WeightFiles, open_weights
from ml_mamba_jax.errors import ConvertError, InputError
from ml_mamba_jax.names import unknown
from ml_mamba_jax.tokenizer import FILE_NAME as TOKENIZER_FILE
from ml_mamba_jax.tokenizer import Tokenizer

CONFIG_FILE = "config.json"
RUN_CHECKPOINT = Path("checkpoints") / "latest-checkpoint.pt"
ENCODERS_FOLDER = "vision"
"""In a run: a folder for each of its encoders. The original keeps none."""
WRAPPERS = ("state_dict", "model", "teacher", "module")
"""Dictionaries inside which a state dict may be saved."""


class Opened(NamedTuple):
    """The tensors of one file or folder under their own names."""

    path: Path
    kind: str
    weights: WeightFiles
    names: dict[str, str]
    """Key, without wrapper, -> name in `weights`."""
    prefix: str
    """Before the names of the family's table, in every key that is needed."""

    @property
    def config_path(self) -> Path:
        if self.kind == "ml-mamba":
            return self.path / CONFIG_FILE if self.path.is_dir() else self.path.parent.parent / CONFIG_FILE
        return (self.path if self.path.is_dir() else self.path.parent) / CONFIG_FILE

    def read_config(self) -> MLMambaConfig:
        shapes = {key.removeprefix(self.prefix): self.weights.info(name).shape for key, name in self.names.items()}
        return read_config(self.kind, read_text(self.config_path), shapes, self.config_path)

    @property
    def documents(self) -> list[Path]:
        """The config and the index of the shards, where there are such."""
        indices = {
            file.parent / name for file in self.weights.files for name in IN_FOLDERS if name.endswith(INDEX_SUFFIX)
        }
        sharded = len(self.weights.files) > 1
        found = [self.config_path, *(sorted(indices) if sharded else [])]
        return [path for path in found if path.is_file()]

    def not_needed(self, config: MLMambaConfig) -> set[str]:
        """Keys that the model has no use for: those behind the last layer that it runs, and other models in the same file."""
        pattern = re.compile(FAMILIES[self.kind].not_needed(config))
        inside = {key: key.removeprefix(self.prefix) for key in self.names if key.startswith(self.prefix)}
        return {key for key in self.names if key not in inside or pattern.match(inside[key])}


class Source:
    """Everything that goes into one conversion. Close it, or use it as a context manager."""

    def __init__(self, kind: str, path: Path, config: MLMambaConfig, tokenizer: Tokenizer | None):
        self.kind, self.path, self.config, self.tokenizer = kind, path, config, tokenizer
        self.documents: list[Path] = []
        """Files without tensors that were read: configs, indices of shards, a tokenizer."""
        self.notes: list[tuple[str, str]] = []
        """Of a tokenizer that was left out: its file, and why."""
        self.assumed: list[tuple[str, str]] = []
        """What the weights do not say, by their file."""
        """On files beside the weights: name, and what became of it."""
        self.pieces: list[Piece] = []
        self.not_needed: set[str] = set()
        self.encoders: dict[str, tuple[str, str]] = {}
        """Kind and prefix of the tensors of each encoder, by its name."""
        self._tensors: dict[str, tuple[WeightFiles, str]] = {}
        self._opened: list[WeightFiles] = []
        self._aliases: dict[int, dict[str, str]] = {}

    def add(self, opened: Opened, pieces: Sequence[Piece], not_needed: set[str], name: str = "") -> None:
        """Add the tensors of a file; `name` stands before its keys and those of its pieces."""
        self._opened.append(opened.weights)
        self.documents += opened.documents
        self.pieces += [piece._replace(key=name + piece.key) for piece in pieces]
        self.not_needed |= {name + key for key in not_needed}
        self._tensors |= {name + key: (opened.weights, own) for key, own in opened.names.items()}

    @property
    def keys(self) -> list[str]:
        return list(self._tensors)

    def info(self, key: str) -> TensorInfo:
        weights, name = self._tensors[key]
        return weights.info(name)

    def read(self, key: str) -> np.ndarray:
        """A view of the mapped file."""
        weights, name = self._tensors[key]
        return weights[name]

    def shares_memory(self, key: str) -> bool:
        """Whether the file stores the tensor once for this key and one before it."""
        weights, name = self._tensors[key]
        if id(weights) not in self._aliases:
            self._aliases[id(weights)] = weights.aliases()
        return name in self._aliases[id(weights)]

    @property
    def embedding(self) -> str:
        """Key of the token embeddings."""
        return next(piece.key for piece in self.pieces if piece.path == "language/embedding")

    @property
    def files(self) -> list[Path]:
        return [file for weights in self._opened for file in weights.files]

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        for weights in self._opened:
            weights.close()


def open_source(
    path: str | Path,
    kind: str | None = None,
    *,
    encoder: str | None = None,
    vision: Sequence[str | Path] = (),
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
) -> Source:
    """Look into a file or folder of PyTorch weights: what they are, their config, and which tensor is which parameter.

    Args:
        kind: one of `FAMILIES`; default: what the tensors tell.
        encoder: a name of `VISION_ENCODERS` that an encoder alone is converted for, for example at another image size.
        vision: files or folders with the encoders of a run of ML-Mamba, in any order. Default: those in its folder `vision`, where
            `to_torch` puts them.
        dtype: in which the parameters are to be kept.
        tokenizer: a tokenizer.json to go with a language model; default: the one beside it, if there is one that fits.

    Raises:
        ConvertError: files that cannot be read or are of no known kind, or encoders that do not belong to the run.
    """
    dtypes = get_args(get_type_hints(MLMambaConfig)["param_dtype"])
    if dtype not in dtypes:
        raise unknown("dtype", dtype, dtypes)
    path = Path(path)
    opened = _open(path, kind)
    try:
        config = opened.read_config()
        if encoder is not None:
            config = config.replace(vision=(_chosen_encoder(encoder, opened, config),))
        carried, note = _find_tokenizer(opened, config, tokenizer)
    except BaseException:
        opened.weights.close()
        raise
    source = Source(opened.kind, path, config.replace(param_dtype=dtype), carried)
    source.notes += [note] if note else []
    if assumed := assumption(opened.kind, opened.config_path.is_file(), config):
        source.assumed.append((opened.path.name, f"{assumed}: there is no config.json beside it"))
    if carried:
        source.documents.append(_tokenizer_path(opened, tokenizer))
    source.add(opened, FAMILIES[opened.kind].pieces(config, opened.prefix), opened.not_needed(config))
    if config.language is None:
        source.encoders[config.vision[0].name] = (opened.kind, opened.prefix)
    try:
        if vision and opened.kind != "ml-mamba":
            raise ConvertError(
                f"{path}: got vision weights for a {opened.kind}, expected them for a run of ML-Mamba only"
            )
        for vision_path in vision or _encoders_beside(opened):
            _add_encoder(source, Path(vision_path))
    except BaseException:
        source.close()
        raise
    return source


def _chosen_encoder(name: str, opened: Opened, config: MLMambaConfig) -> ViTConfig:
    if config.language is not None:
        raise ConvertError(f"{opened.path}: got encoder {name} for a {opened.kind}, expected it for an encoder alone")
    if name not in VISION_ENCODERS:
        raise unknown("encoder", name, VISION_ENCODERS)
    return VISION_ENCODERS[name]


def _encoders_beside(opened: Opened) -> list[Path]:
    """The encoders that `to_torch` puts into the folder of a run."""
    if opened.kind != "ml-mamba":
        return []
    return sorted((opened.config_path.parent / ENCODERS_FOLDER).glob("*"))


def _open(path: Path, kind: str | None) -> Opened:
    run = path / RUN_CHECKPOINT
    weights = open_weights(run if run.is_file() else path)
    names = _without_wrapper(weights)
    try:
        if kind is None:
            kind, prefix = detect(names, path)
        else:
            prefix = prefix_of(kind, names, path)
    except BaseException:
        weights.close()
        raise
    return Opened(path, kind, weights, names, prefix)


def _without_wrapper(weights: WeightFiles) -> dict[str, str]:
    """Key -> name in the file. `{"state_dict": {...}}` loses its first level; a run of ML-Mamba keeps all of its own."""
    for wrapper in WRAPPERS:
        inside = {name.removeprefix(f"{wrapper}/"): name for name in weights if name.startswith(f"{wrapper}/")}
        if inside and not any("/" in key for key in inside):
            return inside
    return {name: name for name in weights}


def _add_encoder(source: Source, path: Path) -> None:
    """Add the weights of one of the encoders of a run, which keep the run's own config (image size and activation)."""
    opened = _open(path, None)
    found = opened.read_config().vision
    if not found:
        raise ConvertError(f"{path}: got a {opened.kind}, expected the weights of an image encoder")
    mine = {encoder.name: encoder for encoder in source.config.vision}
    if found[0].name not in mine:
        raise ConvertError(f"{path}: got a {found[0].name} encoder, expected one of the run's: {', '.join(mine)}")
    encoder = mine[found[0].name]
    if encoder.name in source.encoders:
        raise ConvertError(f"{path}: got a second {encoder.name} encoder, expected one")
    alone, name = MLMambaConfig(language=None, vision=(encoder,)), f"{encoder.name}:"
    source.add(opened, FAMILIES[opened.kind].pieces(alone, opened.prefix), opened.not_needed(alone), name)
    source.encoders[encoder.name] = (opened.kind, name + opened.prefix)


def _find_tokenizer(
    opened: Opened, config: MLMambaConfig, given: str | Path | None
) -> tuple[Tokenizer | None, tuple[str, str] | None]:
    """The tokenizer that was given, or the one beside the weights; and a note where that is left out, with its file.

    Raises:
        ConvertError: the one that was given is no tokenizer of this model.
    """
    path = _tokenizer_path(opened, given)
    if given is not None and not path.is_file():
        raise ConvertError(f"{path}: found no such tokenizer, expected a {TOKENIZER_FILE}")
    if given is not None and config.language is None:
        raise ConvertError(f"{path}: got a tokenizer for a {opened.kind}, expected it for a language model only")
    if not path.is_file() or config.language is None:
        return None, None
    try:
        tokenizer, rows = Tokenizer.from_pretrained(path), config.language.padded_vocab_size
        if tokenizer.vocab_size > rows:
            raise InputError(
                f"got {tokenizer.vocab_size} entries, expected at most one for each of the {rows} embeddings"
            )
    except InputError as error:
        reason = str(error).removeprefix("tokenizer: ")
        if given is not None:
            raise ConvertError(f"{path}: cannot be the tokenizer of these weights: {reason}") from error
        return None, (path.name, f"left out: {reason}; pass another with --tokenizer")
    return tokenizer, None


def _tokenizer_path(opened: Opened, given: str | Path | None) -> Path:
    path = opened.config_path.parent / TOKENIZER_FILE if given is None else Path(given)
    return path / TOKENIZER_FILE if path.is_dir() else path


def missing_encoders(source: Source) -> list[str]:
    """Names of the encoders of a run whose weights were not given."""
    return [encoder.name for encoder in source.config.vision if encoder.name not in source.encoders]
