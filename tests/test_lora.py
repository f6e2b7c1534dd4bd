"""Low-rank additions: they are what is trained, they fold into the kernels, and PyTorch gets what was folded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from ml_mamba_jax import checkpoint, lora, sharding
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.convert import export_torch, import_torch
from ml_mamba_jax.errors import ConvertError, InputError
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.training.config import OptimConfig, StageConfig
from ml_mamba_jax.training.flops import model_cost, step_flops
from ml_mamba_jax.training.initial import start_from
from ml_mamba_jax.training.losses import mean_loss_and_gradient
from ml_mamba_jax.training.optimizer import make_optimizer
from ml_mamba_jax.training.stages import join, split
from ml_mamba_jax.training.step import first_state, make_train_step
from tests import tiny_model
from tests.training.test_flops import traced_flops
from tests.training.test_losses import make_batch

BASE = MLMambaConfig(language=dataclasses.replace(tiny_model.MODEL.config.language, lora_alpha=6.0))
CONFIG = MLMambaConfig(language=dataclasses.replace(BASE.language, lora_rank=3))
MODEL = MLMamba(CONFIG)
STAGE = StageConfig("lora", trains=("language",), optim=OptimConfig(peak_lr=1e-2, warmup=0.0), batch_size=8)
TOKENS = tiny_model.tokens(2, 7)


@pytest.fixture(scope="module")
def params() -> dict:
    """Additions that are not zero beside the kernels of `tiny_model`."""
    params = jax.jit(lambda: MODEL.init(jax.random.key(1), **MODEL.dummy_inputs()))()["params"]
    base, rng = flatten_dict(tiny_model.params()), np.random.default_rng(0)
    flat = {
        path: jnp.asarray(0.1 * rng.standard_normal(a.shape), a.dtype) if path[-1] == "lora_b" else base.get(path, a)
        for path, a in flatten_dict(params).items()
    }
    return unflatten_dict(flat)


def text_batch():
    return make_batch(8)._replace(images={}, image_mask=jnp.zeros(8, bool))


def test_what_is_folded_computes_the_same(params):
    merged, config = lora.merge(params, CONFIG)
    assert config == dataclasses.replace(BASE) and set(merged["language"]["blocks"]["mixer"]["in_proj"]) == {"kernel"}
    want = tiny_model.apply(params, TOKENS, model=MODEL)
    np.testing.assert_allclose(tiny_model.apply(merged, TOKENS, model=MLMamba(config)), want, rtol=1e-4, atol=1e-4)
    kernel, old = (p["language"]["blocks"]["mixer"]["out_proj"]["kernel"] for p in (merged, params))
    a, b = (params["language"]["blocks"]["mixer"]["out_proj"][name] for name in ("lora_a", "lora_b"))
    np.testing.assert_allclose(kernel[1] - old[1], 2.0 * a[1] @ b[1], atol=1e-6)  # alpha 6 over rank 3

    logits, state = tiny_model.apply(params, TOKENS[:, :-1], model=MODEL, method="prefill")
    logits, _ = tiny_model.apply(params, TOKENS[:, -1], state, model=MODEL, method="step")
    np.testing.assert_allclose(logits, want[:, -1], rtol=1e-3, atol=1e-3)


def test_additions_begin_at_zero():
    shapes = flatten_dict(MODEL.param_shapes())
    assert {path[-2:]: a.shape for path, a in shapes.items() if "lora" in path[-1]} == {
        ("in_proj", "lora_a"): (2, 96, 3),
        ("in_proj", "lora_b"): (2, 3, 454),
        ("out_proj", "lora_a"): (2, 192, 3),
        ("out_proj", "lora_b"): (2, 3, 96),
    }
    params = jax.jit(lambda: MODEL.init(jax.random.key(1), **MODEL.dummy_inputs()))()["params"]
    without, config = lora.merge(params, CONFIG)
    np.testing.assert_array_equal(
        tiny_model.apply(params, TOKENS, model=MODEL), tiny_model.apply(without, TOKENS, model=MLMamba(config))
    )


def test_additions_alone_are_trained(params):
    mesh = sharding.make_mesh(1, 2, 1, devices=jax.devices()[:2])
    before = jax.tree.map(np.asarray, params)
    trained, frozen = split(jax.device_put(params, sharding.param_shardings(MODEL, mesh)), STAGE)
    assert {path[-1] for path in flatten_dict(trained)} == {"lora_a", "lora_b"}
    optimizer = make_optimizer(STAGE.optim, MODEL, 10)
    step = make_train_step(MODEL, optimizer, mesh, STAGE)
    state, losses = first_state(optimizer, trained, mesh), []
    for _ in range(3):
        state, metrics = step(state, frozen, text_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    after = flatten_dict(jax.tree.map(np.asarray, join(state.params, frozen)))
    for path, old in flatten_dict(before).items():
        assert np.array_equal(old, after[path]) == ("lora" not in path[-1]), path


def test_kernels_cost_no_gradient(params):
    batch, tokens = text_batch(), 8 * 9

    def traced(trained, frozen, model=MODEL) -> float:
        return traced_flops(lambda p, f: mean_loss_and_gradient(model, p, batch, frozen=f)[1], trained, frozen)

    cost, mixer = model_cost(CONFIG), CONFIG.language.mixer
    saved = traced(params, {}) - traced(*split(params, STAGE))
    convolutions = CONFIG.language.n_layers * 2 * mixer.conv_channels * mixer.d_conv
    kernels = tokens * (cost.language.weights - convolutions) + 8 * 8 * cost.head.weights
    assert saved == kernels, "of the language model's kernels; the head reads all tokens but the first"
    assert cost.lora.weights == 2 * 2 * 3 * (96 + 454 + 192 + 96)
    assert step_flops(CONFIG, STAGE, 0, tokens) < step_flops(BASE, STAGE, 0, tokens)
    wider = CONFIG.replace(language=dataclasses.replace(CONFIG.language, lora_rank=6))
    more = traced(*split(MLMamba(wider).param_shapes(), STAGE), MLMamba(wider)) - traced(*split(params, STAGE))
    assert more == step_flops(wider, STAGE, 0, tokens) - step_flops(CONFIG, STAGE, 0, tokens) > 0


def saved(folder, config: MLMambaConfig, params: dict):
    checkpoint.write_model(folder, config, None)
    checkpoint.save(folder, 0, {checkpoint.PARAMS: params})
    return folder


def test_runs_start_with_additions_and_from_them(tmp_path, params):
    base = saved(tmp_path / "base", BASE, {"language": tiny_model.params()["language"]})
    zeros = jax.tree.map(jnp.zeros_like, params)
    got, _ = start_from([base], CONFIG, jax.tree.map(jnp.ones_like, params))
    for path, a in flatten_dict(got["language"]).items():
        want = jnp.ones_like(a) if "lora" in path[-1] else flatten_dict(tiny_model.params()["language"])[path]
        np.testing.assert_array_equal(a, want)

    run = saved(tmp_path / "run", CONFIG, params)
    jax.tree.map(np.testing.assert_array_equal, start_from([run], CONFIG, zeros)[0], params)
    merged, _ = lora.merge(params, CONFIG)
    plain, _ = start_from([run], BASE, jax.tree.map(jnp.zeros_like, merged))
    jax.tree.map(np.testing.assert_array_equal, plain, merged)
    other = MLMambaConfig(language=dataclasses.replace(CONFIG.language, lora_rank=2))
    with pytest.raises(InputError, match="lora_rank: 3 -> 2"):
        start_from([run], other, zeros)


def test_folded_kernels_reach_pytorch(tmp_path, params, capsys):
    run = saved(tmp_path / "run", CONFIG, params)
    with pytest.raises(ConvertError, match=r"low-rank additions.* fold them first: python -m ml_mamba_jax\.lora"):
        export_torch(run, tmp_path / "torch")
    lora.main([str(run), str(tmp_path / "merged")])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'merged'}\n"
    with pytest.raises(SystemExit):
        lora.main([str(tmp_path / "merged"), str(tmp_path / "again")])
    assert "expected language.lora_rank above 0" in capsys.readouterr().err
    export_torch(tmp_path / "merged", tmp_path / "torch")
    import_torch(tmp_path / "torch", tmp_path / "back")
    merged, _ = lora.merge(params, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_params(tmp_path / "back"), merged)
