"""What this machine has and which kernels it gets: `python -m ml_mamba_jax.info`."""

import dataclasses
import importlib.metadata
import platform
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import ml_mamba_jax
import pallas_kernels as pk
from pallas_kernels.specs import SSD_SPECS, SSDSpec

REQUIRED = ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint", "tokenizers", "pillow")
OPTIONAL = (
    "optax",
    "grain",
    "tensorflow-datasets",
    "tyro",
    "torch",
    "transformers",
    "safetensors",
    "jax-triton",
    "wandb",
)

CONV_WIDTH = 4
IMAGE_GRID = (27, 27)


def main() -> None:
    print("\n\n".join([versions(), devices(), kernels()]))


def versions() -> str:
    """Python, this library, and the packages it uses."""
    rows = [("python", platform.python_version()), ("ml-mamba-jax", ml_mamba_jax.__version__)]
    rows += [(name, _version(name) or "missing") for name in REQUIRED]
    rows += [(name, _version(name) or "not installed (optional)") for name in OPTIONAL]
    return _section("versions", rows)


def devices() -> str:
    """The devices of the default backend."""
    rows = [(f"{device.platform}:{device.id}", device.device_kind) for device in jax.devices()]
    return _section(f"devices ({jax.default_backend()})", rows)


def kernels() -> str:
    """For each op and real shape which backend runs, and for each other backend the reason why not."""
    rows = []
    for op, shape, arguments in calls():
        explanation = pk.explain(op, **arguments)
        rows.append((op, shape, explanation.chosen or "none", "runs" if explanation.chosen else ""))
        rows += [("", "", name, f"no: {reason}") for name, reason in explanation.reasons.items()]
    return _section(f"kernels on {jax.default_backend()}", rows)


def calls() -> list[tuple[str, str, dict]]:
    """(op, shape in words, arguments by name) of a Mamba-2 2.7B layer at the lengths of `pallas_kernels.specs`."""
    found = [("ssd", f"{name} {_shape(spec)}", spec.shapes()) for name, spec in SSD_SPECS.items()]
    train, image = SSD_SPECS["train"], SSD_SPECS["image"]
    found += [
        ("ssd_step", f"decode b={train.b}", _step_arguments(train)),
        ("mamba2_step", f"decode b={train.b}", _mixer_arguments(train)),
        ("mamba2_layers_step", "decode b=1", _layers_arguments(dataclasses.replace(train, b=1))),
        ("mamba2_sequence", f"train {_shape(train)}", _sequence_arguments(train)),
        ("causal_conv1d", f"train {_shape(train)}", _conv_arguments(train)),
        ("gated_rms_norm", f"train {_shape(train)}", _norm_arguments(train)),
        ("visual_scan", f"image {_shape(image)}", _visual_arguments(image)),
        ("mamba2_grid", f"image {_shape(image)}", _grid_arguments(image)),
    ]
    return found


def _step_arguments(spec: SSDSpec) -> dict:
    one_token = {
        name: a if name == "A" else jax.ShapeDtypeStruct((spec.b, *a.shape[2:]), a.dtype)
        for name, a in spec.shapes().items()
    }
    return {"state": jax.ShapeDtypeStruct((spec.b, spec.h, spec.p, spec.n), jnp.float32), **one_token}


def _mixer_arguments(spec: SSDSpec) -> dict:
    sizes, f32 = spec.sizes, jnp.float32
    return {
        "conv_state": jax.ShapeDtypeStruct((spec.b, CONV_WIDTH - 1, sizes.channels), spec.dtype),
        "ssm_state": jax.ShapeDtypeStruct((spec.b, spec.h, spec.p, spec.n), f32),
        "zxbcdt": jax.ShapeDtypeStruct((spec.b, sizes.projected), spec.dtype),
        "conv_weight": jax.ShapeDtypeStruct((sizes.channels, CONV_WIDTH), f32),
        "A": jax.ShapeDtypeStruct((spec.h,), f32),
        "norm_weight": jax.ShapeDtypeStruct((sizes.inner,), f32),
    }


def _layers_arguments(spec: SSDSpec, layers: int = 64) -> dict:
    """Of the whole language model; its width is half of the inner one."""
    sizes = spec.sizes
    width = sizes.inner // 2
    mixers = {
        name: jax.ShapeDtypeStruct((layers, *a.shape), a.dtype)
        for name, a in _mixer_arguments(spec).items()
        if name != "zxbcdt"
    }
    return mixers | {
        "residual": jax.ShapeDtypeStruct((spec.b, width), jnp.float32),
        "in_norm_weight": jax.ShapeDtypeStruct((layers, width), spec.dtype),
        "in_proj": jax.ShapeDtypeStruct((layers, width, sizes.projected), spec.dtype),
        "out_proj": jax.ShapeDtypeStruct((layers, sizes.inner, width), spec.dtype),
    }


def _sequence_arguments(spec: SSDSpec) -> dict:
    arguments = {name: a for name, a in _mixer_arguments(spec).items() if not name.endswith("state")}
    projection = jax.ShapeDtypeStruct((spec.b, spec.l, spec.sizes.projected), spec.dtype)
    return arguments | {"zxbcdt": projection, "groups": spec.g}


def _conv_arguments(spec: SSDSpec) -> dict:
    channels = spec.sizes.channels
    return {
        "x": jax.ShapeDtypeStruct((spec.b, spec.l, channels), spec.dtype),
        "weight": jax.ShapeDtypeStruct((channels, CONV_WIDTH), jnp.float32),
        "bias": jax.ShapeDtypeStruct((channels,), jnp.float32),
        "activation": "silu",
    }


def _norm_arguments(spec: SSDSpec) -> dict:
    x = jax.ShapeDtypeStruct((spec.b, spec.l, spec.h * spec.p), spec.dtype)
    return {"x": x, "z": x, "weight": jax.ShapeDtypeStruct(x.shape[-1:], jnp.float32), "eps": 1e-5}


DIRECTIONS = pk.DIRECTIONS[:2]


def _visual_arguments(spec: SSDSpec) -> dict:
    return spec.shapes() | _of_directions(spec.shapes(), "A") | {"grid": IMAGE_GRID, "directions": DIRECTIONS}


def _grid_arguments(spec: SSDSpec) -> dict:
    arguments = _sequence_arguments(spec)
    return arguments | _of_directions(arguments, "A", "conv_weight") | {"grid": IMAGE_GRID, "directions": DIRECTIONS}


def _of_directions(arguments: dict, *names: str) -> dict:
    """The arguments `names` for each direction."""
    return {name: jax.ShapeDtypeStruct((len(DIRECTIONS), *arguments[name].shape), jnp.float32) for name in names}


def _shape(spec: SSDSpec) -> str:
    return f"b={spec.b} l={spec.l}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _section(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns under a title; the last column is not padded."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = [
        "  " + "  ".join([*(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
    return "\n".join([title, *(line.rstrip() for line in lines)])


if __name__ == "__main__":
    sys.exit(main())
