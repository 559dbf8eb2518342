"""What a GPU may do differently from Triton's interpreter: every access of memory that depends on an order.

The interpreter runs programs one after the other and every operation for all threads at once. A GPU does neither: an
order holds within a program at a barrier alone, and between programs of one launch nowhere. `watching` collects the
places of a launch that another program writes, and those that one program touches twice between two barriers, at least
once to write. Barriers that the compiler sets for its own sake (in products and sums) do not count: they may go.

A tile that is loaded and stored back at the same places is in order without a barrier, for a thread stores what it made
of its own load, if every element belongs to one thread. In smaller tiles warps hold copies, which are loaded by each.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from triton.runtime import interpreter

LANES = 32


@dataclass(frozen=True)
class Access:
    """One load or store of a program."""

    writes: bool
    places: np.ndarray
    """Addresses, those under the mask."""
    pointers: np.ndarray
    """Addresses of the whole tile."""
    line: str


@dataclass
class Watch:
    """What one launch does; `found` grows over launches."""

    kernel: str = ""
    threads: int = LANES
    found: set[str] = field(default_factory=set)
    kernels: set[str] = field(default_factory=set)
    """Names of what was launched."""
    since: list[Access] = field(default_factory=list)
    """Accesses of the program that runs, since its last barrier."""
    touched: list[dict[bool, set[int]]] = field(default_factory=list)
    """Of every program, the places it loads (False) and stores to (True)."""

    def begin(self, kernel: str, warps: int) -> None:
        """A launch."""
        self.kernel, self.threads, self.touched = kernel, LANES * warps, []
        self.kernels.add(kernel)

    def program(self) -> None:
        """The next program of the launch."""
        self.barrier()
        self.touched.append({False: set(), True: set()})

    def take(self, pointers: np.ndarray, mask: np.ndarray, *, writes: bool) -> None:
        """A load or a store."""
        places = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)].ravel()
        self.since.append(Access(writes, places, pointers, _line()))
        self.touched[-1][writes].update(places.tolist())

    def barrier(self) -> None:
        """All threads of the program have come as far as this."""
        accesses, self.since = self.since, []
        orders = set(_orders(accesses).values())
        for first, second in {pair for order in orders for pair in itertools.combinations(order, 2)}:
            one, other = accesses[first], accesses[second]
            if (one.writes or other.writes) and not self._in_order(one, other):
                self.found.add(f"{self.kernel}: {_verb(one)} at {one.line}, {_verb(other)} at {other.line}")

    def _in_order(self, one: Access, other: Access) -> bool:
        """Whether every thread stores to the places that it loaded, and to no other."""
        if one.writes or not np.array_equal(one.pointers, other.pointers):
            return False
        return self.threads == LANES or one.pointers.size >= self.threads or one.line == other.line

    def end(self) -> None:
        """The launch has ended: compare its programs."""
        self.barrier()
        owner: dict[int, int] = {}
        for number, touched in enumerate(self.touched):
            for place in touched[True]:
                if owner.setdefault(place, number) != number:
                    self.found.add(f"{self.kernel}: two programs write one place")
        for number, touched in enumerate(self.touched):
            if any(owner.get(place, number) != number for place in touched[False]):
                self.found.add(f"{self.kernel}: a program reads what another one writes")


def _orders(accesses: list[Access]) -> dict[int, tuple[int, ...]]:
    """Numbers of the accesses of every place that is written, in order."""
    writes = [access.places for access in accesses if access.writes]
    if not writes:
        return {}
    written = np.unique(np.concatenate(writes))
    orders: dict[int, tuple[int, ...]] = {}
    for number, access in enumerate(accesses):
        for place in np.intersect1d(access.places, written).tolist():
            orders[place] = (*orders.get(place, ()), number)
    return orders


def _verb(access: Access) -> str:
    return "stored" if access.writes else "loaded"


def _line() -> str:
    """Line of the kernel that runs: of the innermost frame that is neither Triton's nor of this file."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or "/triton/" in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{frame.f_code.co_name}:{frame.f_lineno}"


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Watch every launch inside the block."""
    watch, builder, executor = Watch(), interpreter.InterpreterBuilder, interpreter.GridExecutor
    real = {name: getattr(builder, name) for name in ("create_masked_load", "create_masked_store", "set_grid_idx")}
    launch = executor.__call__

    def load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        watch.take(pointers.data, mask.data, writes=False)
        return real["create_masked_load"](self, pointers, mask, *rest, **options)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch.take(pointers.data, mask.data, writes=True)
        return real["create_masked_store"](self, pointers, value, mask, *rest)

    def place(self: Any, *index: int) -> None:
        watch.program()
        real["set_grid_idx"](self, *index)

    def run(self: Any, *args: Any, **options: Any) -> None:
        watch.begin(self.fn.__name__, options.get("num_warps", 4))
        launch(self, *args, **options)
        watch.end()

    with contextlib.ExitStack() as stack:
        for owner, name, new in (
            (builder, "create_masked_load", load),
            (builder, "create_masked_store", store),
            (builder, "set_grid_idx", place),
            (builder, "create_barrier", lambda self: watch.barrier()),
            (executor, "__call__", run),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, new)
        yield watch
