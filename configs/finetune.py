"""Go on training a converted or trained ML-Mamba on records of your own.

    python train.py finetune --init converted/ml-mamba-3b --data.prepared data/mine

Connector and language model learn, the encoders are frozen (`--trains connector` for less, `--trains vision connector
language` for all). The model is that of `--init`, of whatever size and make; without a whole model there it is `ml-mamba-3b`.
"""

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.training.config import FINETUNE, DataConfig, OptimConfig, StageConfig, TrainConfig

RECIPE = TrainConfig(
    name="finetune",
    model=MLMambaConfig.named("ml-mamba-3b"),
    stages=(
        StageConfig(
            name="finetune",
            trains=FINETUNE,
            data=DataConfig(max_tokens=2048, batching="grouped"),
            optim=OptimConfig(peak_lr=2e-5, weight_decay=0.1),
            epochs=1.0,
            batch_size=64,
        ),
    ),
    model_of_init=True,
    remat="blocks",
    eval_batch_size=16,
    eval_new_tokens=64,
)
