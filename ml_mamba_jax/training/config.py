"""What a training run is: the schema of the recipes in `configs/`.

A recipe is a value; `train.py` takes one by name and lets any field be overridden on the command line. A run is one stage or
several: each has its data, its optimizer, its length, and the parts of the model that it trains.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import Suppress

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.data.order import Batching
from ml_mamba_jax.data.samples import Form
from ml_mamba_jax.errors import InputError


@dataclass(frozen=True)
class DataConfig:
    """Which records, and how they are read."""

    folder: Path = Path("data")
    """Where prepared data sets are kept."""
    prepared: Path | None = None
    """A folder that `python -m ml_mamba_jax.data.prepare` wrote."""
    json_file: Path | None = None
    """In its place, records to prepare: a json list in the LLaVA form, or a jsonl file."""
    image_folder: Path | None = None
    """What the image paths in json_file are relative to. Default: the folder of json_file."""
    any_suffix: bool = False
    """Take x.png or x.gif where json_file says x.jpg and that is missing."""
    digits: bool = False
    """Without either: compose scenes of handwritten digits."""
    train_scenes: int = 16_000
    """Digit scenes to train on."""
    test_scenes: int = 600
    """Held-out digit scenes."""
    form: Form = "chat"
    """Learn the answers of conversations, or captions of images, without the question (alignment)."""
    max_tokens: int = 96
    """Text tokens of a row; longer conversations are cut."""
    batching: Batching = "random"
    """Rows of one record, padded to max_tokens; "grouped": of similar lengths, text alone apart; "packed": of several records."""
    buckets: int = 4
    """Lengths that grouped rows are padded to, each half of the next. Each is compiled once, and once more for text alone."""
    row_length: int = 4096
    """Positions of packed rows, for visual tokens and text."""
    max_bad: float = 0.0
    """Part of the records that may be unusable, also while json_file is prepared: they are told of and left out. 0: the first one
    ends the run."""
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
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the first moment is kept. The second stays in float32: with b2 = 0.999 it changes by less than bfloat16 resolves."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one may be -1 and takes the rest."""

    data: int = -1
    """Parts of the batch."""
    fsdp: int = 1
    """Parts of the batch, and of parameters and optimizer along the model's width: each layer is gathered when it is needed."""
    tensor: int = 1
    """Parts of heads, inner widths and the vocabulary."""
    sequence: int = 1
    """Parts of the tokens that the language model reads, for long rows."""


@dataclass(frozen=True)
class HostsConfig:
    """The processes of a run on several hosts. On TPU pods, with SLURM and Open MPI each of them knows its place by itself."""

    coordinator_address: str | None = None
    """HOST:PORT at which all reach process 0. Default: $JAX_COORDINATOR_ADDRESS."""
    num_processes: int | None = None
    """How many processes there are. Default: $JAX_NUM_PROCESSES."""
    process_id: int | None = None
    """Which of them this is, from 0. Default: $JAX_PROCESS_ID."""
    cluster: str | None = None
    """Ask this kind of cluster, by JAX's name for it: "k8s", "mpi4py". None: look which one it is."""
    start_timeout: float = 300.0
    """Seconds to wait for the others at the start."""
    peer_timeout: float = 100.0
    """Seconds without a sign of life from a process after which the others end, too."""


Part = Literal["vision", "connector", "language"]
ALIGN: tuple[Part, ...] = ("connector",)
FINETUNE: tuple[Part, ...] = ("connector", "language")
FULL_FINETUNE: tuple[Part, ...] = ("vision", "connector", "language")


@dataclass(frozen=True)
class StageConfig:
    """A piece of a run: which parts learn from which data, and for how long."""

    name: Suppress[str]
    """Begins the stage's options where a run has several: --NAME.batch-size."""
    trains: tuple[Part, ...] = FULL_FINETUNE
    """Parts of the model that learn. The others are frozen: they take no gradient and no memory of the optimizer."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    epochs: float = 1.0
    """Passes over the training split. Counts where `steps` is None."""
    steps: int | None = None
    """Optimizer steps."""
    batch_size: int = 64
    """Rows of one optimizer step, over all devices and micro-batches."""
    micro_batches: int = 1
    """Parts in which a batch is taken one after the other, to save memory."""


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    name: str
    """Of the recipe; also the default name of the run's folder."""
    model: MLMambaConfig
    stages: Suppress[tuple[StageConfig, ...]]
    """One after the other, each from the parameters of the one before and with a new optimizer."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)
    step_timeout: float | None = 1800.0
    """Seconds that processes may take for a step, an evaluation or a checkpoint before all end, because one of them is stuck."""
    init: tuple[Path, ...] = ()
    """Folders of runs or of converted weights to start from. Each gives the parts that it holds: language, connector, encoders."""
    model_of_init: bool = False
    """Take the model that the last whole one of `init` is: its architecture, prompt format and way to resize."""
    from_scratch: bool = False
    """Let the language model and the encoders start from random numbers where `init` does not give them."""
    tokenizer: str | None = None
    """A hub id, a folder or a tokenizer.json. None: that of `init`, else a byte-level BPE trained on the training text."""
    remat: Literal["none", "blocks", "projections"] = "none"
    """Recompute in the backward pass instead of keeping: nothing, the inside of each block, or that without its projections."""
    peak_tflops: float | None = None
    """TFLOP/s of a device, for the model FLOPs utilisation (MFU) in the log. None: known for the usual accelerators."""
    profile: tuple[int, int] | None = None
    """First and last step of a window that JAX's profiler records into the run's folder, for XProf or TensorBoard."""
    seed: int = 0
    log_every: int = 50
    """Steps between two lines of the log."""
    save_every: int = 500
    """Steps between two checkpoints; the last step of a stage is always saved."""
    keep: int = 2
    """Checkpoints that are kept, beside the best one of a stage that is evaluated."""
    eval_every: int | None = None
    """Steps between two evaluations of the stage's test split; the last step of a stage is always evaluated then. None: only the
    finished run is, on all of its test split."""
    eval_records: int = 256
    """Records of an evaluation during training, spread over the test split."""
    eval_batch_size: int = 200
    """Questions answered at a time in the evaluation."""
    eval_new_tokens: int = 16
    """Tokens that an answer may have in the evaluation."""
    writers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where numbers and answers go beside the console and the JSON lines of the run's folder."""
    runs: Path = Path("runs")
    """The run's folder is made in here."""
    dry_run: bool = False
    """Compile the steps for simulated devices, as many as the mesh has, and print what they need and compute. Trains nothing."""
    device_memory: float | None = None
    """GiB of a device: a dry run is refused if what it needs is more."""
    resume: bool = False
    """Go on from the newest checkpoint of the run's folder, or start where there is none."""
    strict: bool = False
    """Do not go back to an older checkpoint where the newest is damaged."""


def check(config: TrainConfig) -> None:
    """Raise InputError for numbers that no run can have."""
    for name in ("log_every", "save_every", "keep", "eval_batch_size", "eval_new_tokens", "eval_records"):
        _check_at_least(1, name, getattr(config, name))
    if config.eval_every is not None:
        _check_at_least(1, "eval_every", config.eval_every)
    if config.profile is not None and not 1 <= config.profile[0] <= config.profile[1]:
        raise InputError(
            f"profile: got steps {config.profile[0]} to {config.profile[1]}, expected two steps in order, from 1"
        )
    numbers = {name: getattr(config, name) for name in ("device_memory", "peak_tflops", "step_timeout")}
    numbers |= {f"hosts.{name}": getattr(config.hosts, name) for name in ("start_timeout", "peer_timeout")}
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise InputError(f"{name}: got {value}, expected more than 0")
    if Path(config.name).name != config.name or not config.name:
        raise InputError(f"name: got {config.name!r}, expected the name of a folder")
    names = [stage.name for stage in config.stages]
    if not names or len(set(names)) < len(names):
        raise InputError(f"stages: got {', '.join(names) or 'none'}, expected one or several of different names")
    for stage in config.stages:
        _check_stage(stage, config.model, prefix=f"{stage.name}." if len(names) > 1 else "")


def _check_stage(stage: StageConfig, model: MLMambaConfig, prefix: str) -> None:
    present = [part for part in FULL_FINETUNE if getattr(model, part)]
    if not stage.trains or not set(stage.trains) <= set(present):
        raise InputError(
            f"{prefix}trains: got {', '.join(stage.trains) or 'nothing'}, expected one or several of the model's parts: "
            f"{', '.join(present)}"
        )
    numbers = {"batch_size": stage.batch_size, "micro_batches": stage.micro_batches}
    numbers |= {"steps": stage.steps} if stage.steps is not None else {}
    of_data = ("max_tokens", "train_scenes", "test_scenes", "buckets", "row_length")
    numbers |= {f"data.{name}": getattr(stage.data, name) for name in of_data}
    for name, value in numbers.items():
        _check_at_least(1, f"{prefix}{name}", value)
    _check_at_least(0, f"{prefix}data.workers", stage.data.workers)
    if not 0 <= stage.data.max_bad < 1:
        raise InputError(
            f"{prefix}data.max_bad: got {stage.data.max_bad}, expected a part of the records, from 0 to below 1"
        )
    if stage.data.prepared is not None and stage.data.json_file is not None:
        raise InputError(f"{prefix}data: got prepared and json_file, expected one of them")
    for name in ("image_folder", "any_suffix"):
        if getattr(stage.data, name) and stage.data.json_file is None:
            raise InputError(
                f"{prefix}data.{name}: got one without json_file, expected both; what is prepared has its images"
            )
    if not 0 < stage.epochs < math.inf:
        raise InputError(f"{prefix}epochs: got {stage.epochs}, expected more than 0")
    optim = stage.optim
    for name in ("peak_lr", "eps", "clip_norm"):  # a norm of infinity clips nothing
        value = getattr(optim, name)
        if not value > 0 or (value == math.inf and name != "clip_norm"):
            raise InputError(f"{prefix}optim.{name}: got {value}, expected a number above 0")
    for name, below in {"warmup": 1, "b1": 1, "b2": 1, "weight_decay": math.inf}.items():
        value = getattr(optim, name)
        if not 0 <= value < below:
            expected = "a number of 0 or more" if below == math.inf else "a number from 0 to below 1"
            raise InputError(f"{prefix}optim.{name}: got {value}, expected {expected}")


def _check_at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise InputError(f"{name}: got {value}, expected at least {least}")
