"""What a training run is: the schema of the recipes in `configs/`.

A recipe is a value; `train.py` takes one by name and lets any field be overridden on the command line.
"""

from dataclasses import dataclass, field
from pathlib import Path

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.data.samples import Form
from ml_mamba_jax.errors import InputError


@dataclass(frozen=True)
class DataConfig:
    """Which records, and how they are read."""

    folder: Path = Path("data")
    """Where prepared data sets are kept."""
    json_file: Path | None = None
    """Records of your own, a json list in the LLaVA form. None: scenes of handwritten digits."""
    image_folder: Path | None = None
    """What the image paths in json_file are relative to. Default: the folder of json_file."""
    train_scenes: int = 16_000
    """Digit scenes to train on."""
    test_scenes: int = 600
    """Held-out digit scenes."""
    form: Form = "chat"
    """Learn the answers of conversations, or captions of images, without the question (alignment)."""
    max_tokens: int = 96
    """Text tokens of a row; longer conversations are cut."""
    workers: int = 0
    """Processes that decode and tokenise; 0: threads of the training process."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine to zero."""

    peak_lr: float = 1e-3
    warmup: float = 0.03
    """Part of the steps over which the learning rate rises."""
    weight_decay: float = 0.1
    """Not for one-dimensional parameters."""
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one may be -1 and takes the rest."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    name: str
    """Of the recipe; also the default name of the run's folder."""
    model: MLMambaConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    init: tuple[Path, ...] = ()
    """Folders of runs or of converted weights to start from. Each gives the parts that it holds: language, connector, encoders."""
    tokenizer: str | None = None
    """A hub id, a folder or a tokenizer.json. None: that of `init`, else a byte-level BPE trained on the training text."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 64
    """Rows of one optimizer step, over all devices and micro-batches."""
    micro_batches: int = 1
    """Parts in which a batch is taken one after the other, to save memory."""
    remat: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    seed: int = 0
    log_every: int = 50
    """Steps between two lines of the log."""
    save_every: int = 500
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = 2
    """Checkpoints that are kept."""
    eval_batch_size: int = 200
    """Questions answered at a time in the evaluation."""
    runs: Path = Path("runs")
    """The run's folder is made in here."""
    resume: bool = False
    """Go on from the newest checkpoint of the run's folder, or start where there is none."""


def check(config: TrainConfig) -> None:
    """Raise InputError for numbers that no run can have."""
    at_least_one = {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "micro_batches": config.micro_batches,
        "log_every": config.log_every,
        "save_every": config.save_every,
        "keep": config.keep,
        "eval_batch_size": config.eval_batch_size,
        "data.max_tokens": config.data.max_tokens,
        "data.train_scenes": config.data.train_scenes,
        "data.test_scenes": config.data.test_scenes,
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise InputError(f"{name}: got {value}, expected at least 1")
    if config.data.workers < 0:
        raise InputError(f"data.workers: got {config.data.workers}, expected 0 or more")
    if not config.optim.peak_lr > 0:
        raise InputError(f"optim.peak_lr: got {config.optim.peak_lr}, expected more than 0")
    if not 0 <= config.optim.warmup < 1:
        raise InputError(f"optim.warmup: got {config.optim.warmup}, expected a part of the steps, from 0 to below 1")
    if Path(config.name).name != config.name or not config.name:
        raise InputError(f"name: got {config.name!r}, expected the name of a folder")
