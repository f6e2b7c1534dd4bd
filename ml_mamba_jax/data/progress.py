"""How far a long task over many records is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 10


@contextmanager
def progress(what: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], object]]:
    """A bar or lines on stderr for a task over `total` records, of which `done` were done before; called with each more."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, initial=done, desc=what, unit=" records", dynamic_ncols=True) as bar:
            yield bar.update
        return
    started = said = time.perf_counter()
    count = done

    def update(records: int) -> None:
        nonlocal count, said
        count += records
        now = time.perf_counter()
        if now - said >= SECONDS_BETWEEN_LINES:
            said, speed = now, (count - done) / (now - started)
            of = "" if total is None else f" of {total:,}"
            print(f"{what}: {count:,}{of} records, {speed:,.0f} a second", file=sys.stderr, flush=True)

    yield update
