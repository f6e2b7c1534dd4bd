"""Meshes: what is refused, with the numbers, and how a step of a large model lies on many devices."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax.traverse_util import flatten_dict

from ml_mamba_jax import sharding
from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.layers import Remat
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.training.config import FINETUNE, DataConfig, MeshConfig, StageConfig
from ml_mamba_jax.training.dry_run import abstract_batch, kept_activations, lower, needs_of
from ml_mamba_jax.training.optimizer import make_optimizer
from ml_mamba_jax.training.stages import split
from ml_mamba_jax.training.step import abstract_params, abstract_state, make_model
from tests import tiny_model

ROOT = Path(__file__).parents[1]
TINY = tiny_model.MODEL


def mesh_of(*sizes: int):
    return sharding.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])


def test_an_axis_of_the_mesh_splits_a_parameter_once():
    rules = {**sharding.RULES, "mlp": "fsdp"}
    with pytest.raises(
        InputError, match=r"connector/blocks/w1/kernel \[layers, embed, mlp\] would be split over fsdp twice"
    ):
        sharding.param_shardings(TINY, mesh_of(2, 2, 2), rules)


def test_sizes_that_a_mesh_does_not_divide_are_named():
    with pytest.raises(InputError, match=r"language has 6 heads, tensor is 4.*A_log \[heads\] has 6, tensor is 4"):
        sharding.param_shardings(TINY, mesh_of(1, 1, 4))
    language = dataclasses.replace(TINY.config.language, vocab_size=501, vocab_multiple=1)
    with pytest.raises(InputError, match=r"language/embedding \[vocab\] has 501, tensor is 2"):
        sharding.param_shardings(MLMamba(TINY.config.replace(language=language)), mesh_of(1, 1, 2))


def test_heads_stay_whole():
    """qkv has 144 features, which three devices could share, but not the four heads."""
    vision = (dataclasses.replace(TINY.config.vision[1], n_heads=4, mlp_dim=192),)
    with pytest.raises(InputError, match=r"vision/siglip has 4 heads, tensor is 3"):
        sharding.param_shardings(MLMamba(TINY.config.replace(vision=vision)), mesh_of(1, 1, 3))


def test_the_sequence_axis_divides_image_and_text_together():
    mesh = mesh_of(1, 1, 1, 4)
    sharding.check_tokens(16 + 48, mesh)
    with pytest.raises(InputError, match=r"sequence 4, .* rows of 46 tokens .* change data\.max-tokens by 2"):
        sharding.check_tokens(16 + 30, mesh)
    with pytest.raises(
        InputError, match="got data x fsdp x tensor x sequence = 1 x 1 x 1 x 3, expected a product of 8"
    ):
        sharding.make_mesh(1, 1, 1, 3)


def stacks(model: MLMamba) -> set[tuple[int, ...]]:
    """Shapes of the parameters of all layers together, in any order of the axes."""
    shapes = flatten_dict(model.param_shapes())
    return {tuple(sorted(a.shape)) for path, a in shapes.items() if "blocks" in path and a.ndim > 2}


def gathered(text: str) -> set[tuple[int, ...]]:
    """Shapes that all-gathers of a compiled module make, without axes of one."""
    return {tuple(sorted(size for size in shape if size > 1)) for shape in exchanged(text, "all-gather(?:-start)?")}


def exchanged(text: str, kinds: str) -> set[tuple[int, ...]]:
    """Shapes of the results of these collectives."""
    found = re.findall(rf"= \(?\w+\[([\d,]+)\]\S* (?:{kinds})\(", text)
    return {tuple(map(int, shape.split(","))) for shape in found}


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 2, 2, 2)])
def test_no_stack_of_layers_is_gathered(sizes):
    """A loop over six layers gathers the weights of one at a time. Bytes of a device fall with what splits them."""
    config = TINY.config.replace(
        language=dataclasses.replace(TINY.config.language, n_layers=6), vision=(), connector=None
    )
    model, mesh = MLMamba(config), mesh_of(*sizes)
    stage = StageConfig("s", trains=("language",), data=DataConfig(max_tokens=16), batch_size=8)
    optimizer = make_optimizer(stage.optim, model, 10)
    params = abstract_params(model, mesh)
    state = abstract_state(optimizer, params, mesh)
    compiled = lower(model, optimizer, mesh, stage, state, {}, abstract_batch(stage, config, mesh)).compile()
    shapes = gathered(compiled.as_text())
    kernel = model.param_shapes()["language"]["blocks"]["mixer"]["in_proj"]["kernel"].shape
    one_layer = tuple(sorted((kernel[1], kernel[2] // (sizes[2] if len(sizes) > 2 else 1))))
    assert one_layer in shapes, "of a layer its weights are gathered"
    assert not shapes & stacks(model)
    whole = sum(a.size * 4 for a in jax.tree.leaves(state))
    held = compiled.memory_analysis().argument_size_in_bytes
    assert whole / (sizes[1] * sizes[2]) < held < 1.2 * whole / (sizes[1] * sizes[2])


def test_what_is_kept_for_the_backward_pass_is_counted():
    """With remat a block keeps its input alone: as many bytes as there are layers more, each of a residual in float32."""
    config = TINY.config.replace(vision=(), connector=None)
    stage = StageConfig("s", trains=("language",), data=DataConfig(max_tokens=16), batch_size=8)

    def kept(n_layers: int, remat: Remat, micro_batches: int = 1, tensor: int = 1) -> int:
        mesh = mesh_of(2, 2, tensor)
        model = MLMamba(config.replace(language=dataclasses.replace(config.language, n_layers=n_layers)), remat=remat)
        parts = dataclasses.replace(stage, micro_batches=micro_batches)
        trained, frozen = split(abstract_params(model, mesh), parts)
        return kept_activations(model, parts, mesh, trained, frozen, abstract_batch(parts, config, mesh))

    residual = 4 * 8 * 16 * 96 // 4  # of four devices that split the batch
    assert kept(9, remat=True) - kept(7, remat=True) == pytest.approx(2 * residual, rel=0.01)
    mixer = config.language.mixer
    projection = 4 * 8 * 16 * mixer.in_proj_features // 4  # the other one's result is the next block's input
    between = kept(9, remat="projections")
    assert between - kept(7, remat="projections") == 2 * (residual + projection)
    halves = [kept(n, remat="projections", tensor=2) for n in (7, 9)]
    assert halves[1] - halves[0] == 2 * (residual + projection // 2)
    assert kept(9, remat=False) > 1.5 * between
    assert kept(9, True, micro_batches=2) - kept(7, True, micro_batches=2) == pytest.approx(residual, rel=0.01)


def test_needs_are_those_of_a_device():
    stage = StageConfig("s", trains=FINETUNE, data=DataConfig(max_tokens=16), batch_size=8)
    config = TINY.config.replace(
        vision=(dataclasses.replace(TINY.config.vision[0], depth=2),),
        connector=dataclasses.replace(TINY.config.connector, scan="none"),
        language=dataclasses.replace(TINY.config.language, n_layers=1),
    )
    needs = needs_of(stage, MLMamba(config), mesh_of(1, 2, 1))
    assert needs.n_trained + needs.n_frozen == sum(a.size for a in jax.tree.leaves(MLMamba(config).param_shapes()))
    assert needs.optimizer == pytest.approx(2 * needs.trained, abs=64) and needs.gradients == needs.trained
    assert 4 * needs.n_trained / 2 < needs.trained < 4 * needs.n_trained / 2 * 1.1
    assert needs.compiled > needs.trained + needs.frozen + needs.optimizer


SMALLER = ("--model.language.n-layers", "1", "--model.connector.n-layers", "1")


def test_a_dry_run_prints_what_is_needed_and_refuses_what_cannot_fit(tmp_path):
    command = [sys.executable, "train.py", "digits-vqa", "--dry-run", "--mesh.fsdp", "2"]
    command += ["--runs", str(tmp_path / "runs"), "--batch-size", "512", *SMALLER, "--device-memory", "0.001"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert done.stdout.startswith("digits-vqa on 2 simulated device(s): data 1 x fsdp 2 x tensor 1 x sequence 1\n")
    for line in ("trained parameters", "optimizer", "gradients", "activations kept", "FLOPs of a step"):
        assert f"\n  {line} " in done.stdout
    assert re.search(r"^error: device_memory: got 0.001 GiB, but train needs at least [\d.]+ GiB", done.stderr, re.M)
    assert not (tmp_path / "runs").exists()


SCRIPT = """
import sys
from tests.test_sharding import print_partition
print_partition(*map(int, sys.argv[1:]))
"""


def print_partition(data: int, fsdp: int, tensor: int, batch_size: int) -> None:
    """Lower and partition a finetuning step of ML-Mamba 3B; print bytes of a device's arguments and what is gathered."""
    from configs import PRESETS
    from ml_mamba_jax.training.dry_run import simulate_devices

    recipe = PRESETS["ml-mamba-3b"]
    mesh = sharding.make_mesh(**vars(simulate_devices(MeshConfig(data, fsdp, tensor))))
    stage = dataclasses.replace(recipe.stages[1], batch_size=batch_size)
    model = make_model(recipe)
    trained, frozen = split(abstract_params(model, mesh), stage)
    optimizer = make_optimizer(stage.optim, model, 1000)
    state = abstract_state(optimizer, trained, mesh)
    lowered = lower(model, optimizer, mesh, stage, state, frozen, abstract_batch(stage, recipe.model, mesh))
    compiled = lowered.compile()
    text, held = compiled.as_text(), compiled.memory_analysis().argument_size_in_bytes
    whole_rows = [s for s in exchanged(text, "all-gather|all-reduce|all-to-all") if batch_size in s and len(s) > 2]
    print(held, json.dumps(sorted(gathered(text))), json.dumps(whole_rows), sep="\n")


MESHES = [(1, 8, 1, 24), (1, 64, 1, 192), (1, 128, 2, 384)]


@pytest.mark.parametrize(
    "data, fsdp, tensor, batch_size, optimized",
    [
        (*MESHES[-1], False),
        *(pytest.param(*sizes, True, marks=pytest.mark.full) for sizes in (*MESHES, (2, 16, 2, 96), (4, 64, 1, 768))),
    ],
)
def test_ml_mamba_3b_partitions(data, fsdp, tensor, batch_size, optimized):
    """On 8, 64 and 256 devices: bytes fall as they should, and no stack of layers is gathered."""
    sizes = map(str, (data, fsdp, tensor, batch_size))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *sizes],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": str(not optimized).lower()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    held, shapes, whole_rows = done.stdout.splitlines()[-3:]
    assert json.loads(whole_rows) == [], "activations stay where their rows are"
    model = MLMamba(MLMambaConfig.named("ml-mamba-3b"))
    shapes, whole = set(map(tuple, json.loads(shapes))), model.param_shapes()
    assert (2560, 10576 // tensor) in shapes
    assert not shapes & stacks(model)
    bytes_each = {"vision": 4, "connector": 12, "language": 12}  # with two moments of the optimizer, unless frozen
    expected = sum(bytes_each[part] * a.size for part in whole for a in jax.tree.leaves(whole[part]))
    assert expected / (fsdp * tensor) < int(held) < 1.15 * expected / (fsdp * tensor) + 2**23


@pytest.mark.parametrize(
    "local, inner, parts",
    [
        (4, 1, [(0, 3), (1, 3), (2, 3)]),
        (4, 4, [(0, 3), (1, 3), (2, 3)]),
        (2, 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (4, 8, [(0, 1), (0, 1)]),
    ],
)
def test_each_process_reads_the_rows_that_its_devices_hold(local, inner, parts):
    n_devices = local * len(parts)
    assert [sharding._part_of(i, n_devices, local, inner) for i in range(len(parts))] == parts
    held = [{device // inner for device in range(i * local, (i + 1) * local)} for i in range(len(parts))]
    blocks = n_devices // inner
    for rows, (part, n) in zip(held, parts, strict=True):
        assert rows == set(range(part * blocks // n, (part + 1) * blocks // n))


def test_rows_that_are_split_over_unequal_parts_of_processes_are_refused():
    with pytest.raises(
        InputError, match="got tensor x sequence = 6 with 4 devices in a process, expected one to divide"
    ):
        sharding._part_of(0, 12, 4, 6)
