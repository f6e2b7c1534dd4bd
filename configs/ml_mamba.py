"""The recipe of ML-Mamba (arXiv 2407.19832): align the connector on 558K captions, then finetune on 665K conversations.

    python train.py ml-mamba-3b --init converted/mamba2-2.7b converted/dinov2 converted/siglip

`--init` takes folders that `convert_torch.py` wrote: the language model, with its tokenizer (`--tokenizer`; GPT-NeoX's, which the
weights do not bring along), and both encoders. The connector starts at random.
Data is expected where LLaVA's scripts and those of ML-Mamba put it, below `data/download`; `--align.data.json-file` and
`--finetune.data.json-file` name other places. The paper took 31 hours on eight A100 of 80 GB.

The sources disagree, so there are several readings:

* epochs of the finetuning: two in the paper's text and the code's default (`ml-mamba-3b`), one in its table 1 (`-1-epoch`);
* its batch: 64 rows in table 1, as here, 128 in the code (`--finetune.batch-size 128`);
* the alignment is the paper's; the code leaves it out by default, as `ml-mamba-3b-1231k` does, whose data, one epoch and batch
  of 128 are those of the released model's config.

The other recipes are the paper's comparisons (tables 4 to 7): another language model, encoder, connector or scan, all else equal.
"""

import dataclasses
from pathlib import Path

from ml_mamba_jax.config import NAMED, MLMambaConfig
from ml_mamba_jax.training.config import ALIGN, FINETUNE, DataConfig, OptimConfig, StageConfig, TrainConfig

CAPTIONS = Path("data/download/llava-laion-cc-sbu-558k")
CONVERSATIONS = Path("data/download/llava-v1.5-instruct")

ALIGN_558K = StageConfig(
    name="align",
    trains=ALIGN,
    data=DataConfig(json_file=CAPTIONS / "chat.json", form="caption", max_tokens=2048, batching="grouped", buckets=6),
    optim=OptimConfig(peak_lr=1e-3, weight_decay=0.0),
    epochs=1.0,
    batch_size=256,
)
FINETUNE_665K = StageConfig(
    name="finetune",
    trains=FINETUNE,
    data=DataConfig(json_file=CONVERSATIONS / "llava_v1_5_mix665k.json", max_tokens=2048, batching="grouped"),
    optim=OptimConfig(peak_lr=2e-5, weight_decay=0.1),
    epochs=2.0,
    batch_size=64,
)
FINETUNE_1231K = dataclasses.replace(
    FINETUNE_665K,
    data=DataConfig(
        json_file=CONVERSATIONS / "llava_v1_5_lvis4v_lrv_mix1231k.json", max_tokens=2048, batching="grouped"
    ),
    epochs=1.0,
    batch_size=128,
)


def _recipe(name: str, model: str, *stages: StageConfig) -> TrainConfig:
    return TrainConfig(
        name=name,
        model=MLMambaConfig.named(model),
        stages=stages,
        remat="blocks",
        seed=7,
        save_every=1000,
        eval_batch_size=16,
        eval_new_tokens=64,
    )


COMPARISONS = {
    "ml-mamba-780m": "the paper's, with the language model of 780M parameters (table 4)",
    "ml-mamba-1.3b": "the paper's, with the language model of 1.3B parameters (table 4)",
    "ml-mamba-3b-dinov2": "the paper's, with DINOv2 alone (table 5)",
    "ml-mamba-3b-siglip": "the paper's, with SigLIP alone (table 5)",
    "ml-mamba-3b-mlp": "the paper's, with a connector without scan (table 6)",
    "ml-mamba-3b-msc-basic": "the paper's, with a connector without SwiGLU (table 6)",
    "ml-mamba-3b-csm": "the paper's, with the cross scan (table 7)",
    "ml-mamba-3b-ldpnet": "the paper's, with 196 visual tokens of LDPv2",
    "ml-mamba-3b-vss-l2": "the paper's, with the connector of VL-Mamba",
}
assert set(COMPARISONS) <= set(NAMED)

RECIPES: dict[str, tuple[str, TrainConfig]] = {
    "ml-mamba-3b": (
        "ML-Mamba as in the paper: aligned on 558K captions, finetuned for two epochs on 665K conversations.",
        _recipe("ml-mamba-3b", "ml-mamba-3b", ALIGN_558K, FINETUNE_665K),
    ),
    "ml-mamba-3b-1-epoch": (
        "The same with one epoch of finetuning, as the paper's table 1 says.",
        _recipe("ml-mamba-3b-1-epoch", "ml-mamba-3b", ALIGN_558K, dataclasses.replace(FINETUNE_665K, epochs=1.0)),
    ),
    "ml-mamba-3b-1231k": (
        "As the released model's config says: not aligned, finetuned on the mix of 1231K conversations.",
        _recipe("ml-mamba-3b-1231k", "ml-mamba-3b", FINETUNE_1231K),
    ),
} | {
    name: (f"A comparison: {summary}.", _recipe(name, name, ALIGN_558K, FINETUNE_665K))
    for name, summary in COMPARISONS.items()
}
