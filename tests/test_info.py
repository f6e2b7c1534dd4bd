"""`python -m ml_mamba_jax.info`: what it prints is true of this machine, and aligned."""

import importlib.metadata
import subprocess
import sys

import jax
import pytest

import pallas_kernels as pk
from ml_mamba_jax import info


def test_versions_and_devices_are_those_of_this_machine():
    lines = info.versions().splitlines()
    assert lines[0] == "versions"
    values = dict(line.split(maxsplit=1) for line in lines[1:])
    assert values["jax"] == jax.__version__ and values["python"] == sys.version.split()[0]
    for name in (*info.REQUIRED, *info.OPTIONAL):
        try:
            assert values[name] == importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            assert values[name] == "not installed (optional)"
    assert info.devices().splitlines()[0] == f"devices ({jax.default_backend()})"
    assert len(info.devices().splitlines()) == 1 + len(jax.devices())


def test_every_op_is_explained_at_shapes_that_it_takes():
    calls = info.calls()
    assert {op for op, _, _ in calls} == set(pk.OPS)
    for op, _, arguments in calls:
        arrays = {k: v for k, v in arguments.items() if isinstance(v, jax.ShapeDtypeStruct)}
        options = {k: v for k, v in arguments.items() if k not in arrays}
        jax.eval_shape(lambda op=op, options=options, **arrays: getattr(pk, op)(**arrays, **options), **arrays)


def test_the_table_says_what_explain_says():
    lines = info.kernels().splitlines()[1:]
    rows = iter(lines)
    for op, shape, arguments in info.calls():
        explanation = pk.explain(op, **arguments)
        assert next(rows).split() == [op, *shape.split(), explanation.chosen, "runs"]
        for name, reason in explanation.reasons.items():
            assert next(rows).strip() == f"{name}{' ' * (len('pallas_gpu') - len(name))}  no: {reason}"
    assert next(rows, None) is None
    assert len({line.index("no: ") for line in lines if "no: " in line}) == 1  # aligned
    assert all("no: " in line or line.endswith("runs") for line in lines)


def test_a_backend_that_is_asked_for_shows(monkeypatch):
    with pk.use_implementation("reference"):
        ssd = next(line for line in info.kernels().splitlines() if " ssd " in line)
    assert ssd.split()[-2:] == ["reference", "runs"]


def test_the_command_line_prints_all_three():
    result = subprocess.run([sys.executable, "-m", "ml_mamba_jax.info"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    titles = [line.split()[0] for line in result.stdout.splitlines() if line and not line.startswith(" ")]
    assert titles == ["versions", "devices", "kernels"]


@pytest.mark.parametrize("rows", [[("a", "b")], [("a", "bb", "c"), ("aaa", "b", "")]])
def test_columns_are_aligned(rows):
    title, *lines = info._section("title", rows)[:].splitlines()
    assert title == "title" and len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert line.split() == [cell for cell in row if cell] and line == line.rstrip()
