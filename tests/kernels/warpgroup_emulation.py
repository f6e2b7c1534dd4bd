"""Runs the body of a Mosaic GPU kernel on a CPU: a thread for each warpgroup of each block, NumPy arrays for references.

What the body says is computed as it stands, with its barriers, copies and semaphores; only the names it calls (`pl`,
`plgpu`, `lax`, loads) mean something else here. A barrier that its waiter misses by two phases, a wait that never ends
and a read of memory that nobody wrote (NaN) are found; missing fences and layouts that do not fit are not.
"""

import itertools
import threading

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

SECONDS = 60  # that a wait may take


class Ref:
    """A view of an array."""

    def __init__(self, array):
        self.array = array

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)

    @property
    def at(self):
        return _At(self)

    def __getitem__(self, index):
        return np.array(self.array[_index(index)])

    def __setitem__(self, index, value):
        self.array[_index(index)] = np.asarray(value).astype(self.dtype)

    def transpose(self, axes):
        return Ref(self.array.transpose(axes))


class _At:
    def __init__(self, ref):
        self.ref = ref

    def __getitem__(self, index):
        index = _index(index)
        array = self.ref.array
        return Outside(array, index) if _reaches_out(array, index) else Ref(array[index])


class Outside(Ref):
    """A slice that ends behind its array, where copies find zeros."""

    def __init__(self, array, index):
        inside = array[index]
        shape = [i.stop - i.start for i in index if isinstance(i, slice)]
        filled = np.zeros(shape, array.dtype)
        filled[tuple(slice(0, n) for n in inside.shape)] = inside
        super().__init__(filled)


def _index(index):
    index = index if isinstance(index, tuple) else (index,)
    index = tuple(i if isinstance(i, slice) or i is Ellipsis else int(i) for i in index)
    starts = [i.start or 0 if isinstance(i, slice) else i for i in index if i is not Ellipsis]
    assert all(start >= 0 for start in starts), f"before the first: {index}"
    return index


def _reaches_out(array, index) -> bool:
    slices = [(i, n) for i, n in zip(index, array.shape, strict=False) if isinstance(i, slice)]
    return any(i.stop is not None and i.stop > n for i, n in slices)


class Barrier:
    """Of `arrivals`; every thread waits for its phases one after the other, as a parity bit makes it."""

    def __init__(self, arrivals: int, failed: threading.Event):
        self.arrivals, self.failed = arrivals, failed
        self.count, self.waits, self.changed = 0, {}, threading.Condition()

    def arrive(self):
        with self.changed:
            self.count += 1
            self.changed.notify_all()

    def wait(self):
        me = threading.get_ident()
        with self.changed:
            waits = self.waits.get(me, 0)
            _wait_for(self.changed, lambda: self.count // self.arrivals > waits, self.failed)
            assert self.count // self.arrivals <= waits + 1, "a barrier is two phases ahead of a warpgroup that waits"
            self.waits[me] = waits + 1


class Semaphore:
    def __init__(self, failed: threading.Event):
        self.value, self.changed, self.failed = 0, threading.Condition(), failed

    def signal(self):
        with self.changed:
            self.value += 1
            self.changed.notify_all()

    def wait(self, value: int):
        with self.changed:
            _wait_for(self.changed, lambda: self.value >= value, self.failed)


def _wait_for(condition, ready, failed) -> None:
    for _ in range(SECONDS * 20):
        if failed.is_set():
            raise RuntimeError("another warpgroup failed")
        if condition.wait_for(ready, timeout=0.05):
            return
    raise TimeoutError("nobody comes")


class _Where(threading.local):
    axes: dict = {}  # noqa: RUF012, of this thread


where = _Where()


class _Instead:
    """A module with some names replaced."""

    def __init__(self, module, **names):
        self.__dict__.update(names)
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)


def _fori_loop(start, stop, body, carry):
    for i in range(int(start), int(stop)):
        carry = body(i, carry)
    return carry


def _run_scoped(body, *accumulators):
    return body(*(Ref(np.zeros(a.shape, a.dtype)) for a in accumulators))


def _when(condition):
    return lambda run: run() if condition else None


def _loop(start, stop):
    return lambda run: [run(i) for i in range(int(start), int(stop))]


def _copy(source, target, barrier):
    target[...] = source.array
    barrier.arrive()


def _wgmma(sums, a, b):
    assert a.shape[0] % 64 == 0 and a.shape[1] == b.shape[0] and b.shape[1] % 8 == 0
    sums.array += a.array.astype(np.float32) @ b.array.astype(np.float32)


def _semaphore_wait(semaphore, value, *, decrement, memory_scope):
    assert not decrement and memory_scope == "gpu"
    semaphore.wait(value)


class Barriers:
    """A single one is used as it is, several by number."""

    def __init__(self, barriers: list[Barrier]):
        self.barriers = barriers

    @property
    def at(self):
        return self.barriers

    def arrive(self):
        self.barriers[0].arrive()

    def wait(self):
        self.barriers[0].wait()


def load(ref, layout=None, *, device_memory=False):
    return np.array(ref.array)


NAMES = {
    "lax": _Instead(
        lax,
        axis_index=lambda name: where.axes[name],
        fori_loop=_fori_loop,
        div=lambda a, b: int(a) // int(b),
        rem=lambda a, b: int(a) % int(b),
    ),
    "pl": _Instead(
        pl,
        when=_when,
        loop=_loop,
        run_scoped=_run_scoped,
        ds=lambda start, size: slice(int(start), int(start) + size),
        get_global=lambda _: where.axes["semaphore"],
    ),
    "plgpu": _Instead(
        plgpu,
        layout_cast=lambda a, _: a,
        commit_smem=lambda: None,
        barrier_arrive=lambda barrier: barrier.arrive(),
        barrier_wait=lambda barrier: barrier.wait(),
        copy_gmem_to_smem=_copy,
        wgmma=_wgmma,
        wgmma_wait=lambda groups: None,
        semaphore_signal=lambda semaphore, *, memory_scope: semaphore.signal(),
        semaphore_wait=_semaphore_wait,
    ),
    "load": load,
    "load32": lambda ref, layout=None: load(ref).astype(jnp.float32),
}


def run(monkeypatch, modules, body, refs, shared, *, blocks: int, warpgroups: int) -> None:
    """`body(*refs, **shared memory)` by every warpgroup.

    Args:
        modules: where the names are replaced.
        refs: the arrays in device memory; they change in place.
        shared: what a block allocates: a `plgpu.SMEM`, a union of two of the same size, or a `plgpu.Barrier`.
    """
    for module, name in itertools.product(modules, NAMES):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, NAMES[name])
    failed, problems = threading.Event(), []
    semaphore = Semaphore(failed)

    def thread(block, warpgroup, buffers):
        where.axes = {"block": block, "warpgroup": warpgroup, "semaphore": semaphore}
        try:
            body(*map(Ref, refs), **buffers)
        except Exception as problem:
            problems.append(problem)
            failed.set()

    threads = []
    for block in range(blocks):
        buffers = {name: _allocate(a, failed) for name, a in shared.items()}
        threads += [threading.Thread(target=thread, args=(block, i, dict(buffers))) for i in range(warpgroups)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    if problems:
        raise problems[0]


def _allocate(a, failed):
    if isinstance(a, plgpu.Barrier):
        return Barriers([Barrier(a.num_arrivals, failed) for _ in range(int(np.prod(a.num_barriers)))])
    if isinstance(a, plgpu.RefUnion):
        ref = _memory(a.refs[0])
        return ref, ref
    return _memory(a)


def _memory(a):
    """Of numbers that no kernel means."""
    nobody = np.nan if jnp.issubdtype(a.dtype, jnp.floating) else jnp.iinfo(a.dtype).min
    return Ref(np.full(a.shape, nobody, a.dtype))
