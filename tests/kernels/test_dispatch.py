"""Who is chosen to run, what is said about it, and what happens when nobody can."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import dispatch
from pallas_kernels.dispatch import Op
from pallas_kernels.specs import SSD_SPECS


@pytest.fixture
def op(monkeypatch):
    """An op with a backend of each kind: runs anywhere, refuses odd lengths, lacks its device, cannot be imported."""
    package = types.ModuleType("fake_op")
    package.__path__ = []
    backends = {
        "reference": {"double": lambda x: ("reference", x)},
        "xla": {"double": lambda x: ("xla", x)},
        "pallas_gpu": {
            "double": lambda x: ("pallas_gpu", x),
            "why_not_double": lambda x: f"length {x.shape[0]} is odd" if x.shape[0] % 2 else None,
        },
        "triton": {"double": lambda x: ("triton", x), "why_not_here": lambda: "there is no such device here"},
    }
    monkeypatch.setitem(sys.modules, "fake_op", package)
    for name, functions in backends.items():
        module = types.ModuleType(f"fake_op.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("pallas_tpu", "triton", "pallas_gpu", "xla"))
    return Op("double", "fake_op", ("reference", "xla", "pallas_gpu", "pallas_tpu", "triton"))


EVEN, ODD = np.zeros(4), np.zeros(3)


def test_first_that_takes_the_arguments(op):
    assert op(None, EVEN)[0] == "pallas_gpu"
    assert op(None, ODD)[0] == "xla"


def test_name_or_error(op):
    assert op("reference", ODD)[0] == "reference"
    with pytest.raises(ExceptionGroup, match="double: no backend takes these arguments") as error:
        op("pallas_gpu", ODD)
    assert [str(e) for e in error.value.exceptions] == ["pallas_gpu: length 3 is odd"]


def test_named_backend_does_not_ask_for_its_device(op):
    assert op("triton", EVEN)[0] == "triton"


def test_tuple_is_tried_in_order(op):
    assert op(("pallas_gpu", "reference"), EVEN)[0] == "pallas_gpu"
    assert op(("pallas_gpu", "reference"), ODD)[0] == "reference"


def test_all_reasons_when_all_fail(op):
    with pytest.raises(ExceptionGroup) as error:
        op(("pallas_gpu", "pallas_tpu"), ODD)
    reasons = [str(e) for e in error.value.exceptions]
    assert all(isinstance(e, NotImplementedError) for e in error.value.exceptions)
    assert reasons == [
        "pallas_gpu: length 3 is odd",
        "pallas_tpu: cannot be imported: No module named 'fake_op.pallas_tpu'",
    ]


def test_explain(op):
    explanation = op.explain(ODD)
    assert explanation.chosen == "xla" and explanation.platform == "cpu"
    assert explanation.reasons == {
        "pallas_gpu": "length 3 is odd",
        "pallas_tpu": "cannot be imported: No module named 'fake_op.pallas_tpu'",
        "triton": "there is no such device here",
        "reference": "it is the oracle of the tests, never chosen automatically",
    }
    assert str(explanation).splitlines()[0] == "double on cpu: xla"
    assert "  not pallas_gpu: length 3 is odd" in str(explanation).splitlines()


def test_explain_without_arguments_asks_for_device_and_imports_only(op):
    explanation = op.explain()
    assert explanation.chosen == "pallas_gpu"
    assert explanation.reasons["triton"] == "there is no such device here"


def test_explain_names_what_was_preferred(op):
    assert op.explain(EVEN).reasons["xla"] == "it would run, but pallas_gpu is preferred on cpu"


def test_explain_names_what_was_never_measured_to_win(op, monkeypatch):
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("xla",))
    reason = "it would run, but nobody has measured it to beat xla on a cpu; name it to use it"
    assert op.explain(EVEN).reasons["pallas_gpu"] == reason


def test_explain_a_named_choice(op):
    explanation = op.explain(ODD, implementation="pallas_gpu")
    assert explanation.chosen is None
    assert explanation.reasons["xla"] == "it would run, but was not asked for"
    assert str(explanation).splitlines()[0] == "double on cpu: no backend takes these arguments"


def test_use_implementation(op):
    with pk.use_implementation("reference"):
        assert op(None, EVEN)[0] == "reference"
        assert op("xla", EVEN)[0] == "xla"  # the call itself has the last word
        with pk.use_implementation(("pallas_gpu", "xla")):
            assert op(None, ODD)[0] == "xla"
        with pk.use_implementation(None):
            assert op(None, EVEN)[0] == "pallas_gpu"
        assert op.explain(EVEN).chosen == "reference"
    assert op(None, EVEN)[0] == "pallas_gpu"


def test_use_implementation_ends_with_an_error(op):
    with pytest.raises(KeyError), pk.use_implementation("reference"):
        raise KeyError
    assert op(None, EVEN)[0] == "pallas_gpu"


@pytest.mark.parametrize("wrong", ["cuda", ("xla", "cuda"), ()])
def test_unknown_names(op, wrong):
    with pytest.raises(ValueError, match=r"implementation: got '(cuda)?', expected one of reference, xla"):
        op(wrong, EVEN)
    with pytest.raises(ValueError, match="implementation: got"), pk.use_implementation(wrong):
        pass


def test_platform_without_preferences(op, monkeypatch):
    monkeypatch.delitem(dispatch.PREFERENCE, "cpu")
    assert op(None, EVEN)[0] == "xla"


# The real ops.


@pytest.mark.parametrize("name", pk.OPS)
def test_every_op_explains_itself_without_arguments(name):
    explanation = pk.explain(name)
    assert explanation.chosen == "xla"
    assert explanation.reasons.keys() == set(pk.IMPLEMENTATIONS) - {"xla"}


@pytest.mark.parametrize("spec", SSD_SPECS)
def test_explain_takes_abstract_arguments(spec):
    shapes = SSD_SPECS[spec].shapes()
    assert pk.explain("ssd", **shapes, return_final_state=True).chosen == "xla"
    y = jax.eval_shape(lambda arrays: pk.ssd(**arrays), shapes)
    assert y.shape == shapes["x"].shape and y.dtype == shapes["x"].dtype


def test_explain_unknown_op():
    with pytest.raises(ValueError, match="op: got 'sdd', expected one of ssd, ssd_step"):
        pk.explain("sdd")


def test_named_backends_run():
    x = jnp.ones((1, 4, 1, 2))
    arguments = (x, jnp.ones((1, 4, 1)), -jnp.ones(1), jnp.ones((1, 4, 1, 3)), jnp.ones((1, 4, 1, 3)))
    y = pk.ssd(*arguments)
    np.testing.assert_array_equal(pk.ssd(*arguments, implementation="xla"), y)
    np.testing.assert_allclose(pk.ssd(*arguments, implementation=("reference",)), y, rtol=1e-6)
    token = [a[:, 0] if a.ndim > 1 else a for a in arguments]
    with pytest.raises(ExceptionGroup) as error:
        pk.ssd_step(jnp.zeros((1, 1, 2, 3)), *token, implementation=("pallas_gpu", "pallas_tpu"))
    assert len(error.value.exceptions) == 2
    with pytest.raises(ValueError, match="implementation: got 'tritn'"):
        pk.ssd(*arguments, implementation="tritn")


def test_xla_lowers_for_devices_that_are_not_here():
    shapes = SSD_SPECS["image"].shapes()
    scan = jax.jit(lambda arrays: pk.ssd(**arrays, implementation="xla"))
    exported = jax.export.export(scan, platforms=["cuda", "tpu"])(shapes)
    assert exported.platforms == ("cuda", "tpu")
