"""The engine's thread: requests come in from an asyncio loop, tokens go back to it.

One thread drives the engine; the loop's side never waits for a forward pass. All tokens of a step go back in one
call, since waking the loop costs more than a small model's token; and of a text that is wanted whole only its end does.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator

import torch

from gavamoe.errors import RunError
from gavamoe.generation.decoding_engine import Engine, Row

_log = logging.getLogger(__name__)
_IDLE_POLL_S = 0.5
_LOST = -1
"""Stands for a count where the row was lost."""


def use_torch_threads(count: int) -> None:
    """Let the calling thread's arithmetic use so many threads, whatever others set for themselves later."""
    torch.set_num_threads(count)
    torch.get_num_threads()  # or its first product would take what was set last, by whichever thread


class Ticket:
    """One row's place in the engine; iterating yields how many tokens it has, each time that has grown, or once at the
    end."""

    def __init__(self, row: Row, thread: "EngineThread", each_token: bool) -> None:
        self.row, self._thread, self.each_token = row, thread, each_token
        self.news: asyncio.Queue[int] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    async def __aiter__(self) -> AsyncIterator[int]:
        """Raises RunError if the engine failed while the row was in it."""
        while True:
            count = await self.news.get()
            while not self.news.empty():
                count = self.news.get_nowait()
            if count == _LOST:
                raise RunError("the generation engine failed")
            yield count
            if self.row.done and count == len(self.row.tokens):
                return

    def close(self) -> None:
        """Take no more news; an unfinished row gives its slot back."""
        self._thread.close_ticket(self)


class EngineThread:
    """Runs an engine until `close()`. Its methods are called on one asyncio loop."""

    def __init__(self, engine: Engine, threads: int | None = None) -> None:
        """`threads`: of torch's arithmetic in the engine's thread; None: as many as elsewhere in the process.

        Elsewhere it should then be one. OpenMP gives each thread that computes helpers of its own, and once they are
        more than the machine has cores all of them sleep between two products: with 2 threads on 2 cores a text took
        2.4 times as long.
        """
        self._engine = engine
        self._torch_threads = threads
        self._changed = threading.Condition()
        self._tickets: dict[int, Ticket] = {}
        self._cancelled: list[Row] = []
        self._closed = False
        self._failures = 0
        self._step_started: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> tuple[int, int]:
        """Rows being written, and rows that wait."""
        return len(self._engine.active), len(self._engine.waiting)

    def start(self, row: Row, *, each_token: bool = True) -> Ticket:
        """Have a row written. The ticket must be closed, whatever becomes of it.

        Args:
            each_token: whether the ticket tells of every token, or of the finished row alone.

        Raises:
            EngineFull: too many rows wait.
        """
        ticket = Ticket(row, self, each_token)
        with self._changed:
            self._engine.submit(row)
            self._tickets[id(row)] = ticket
            self._changed.notify()
        return ticket

    def close_ticket(self, ticket: Ticket) -> None:
        """`Ticket.close`."""
        with self._changed:
            self._tickets.pop(id(ticket.row), None)
            if not ticket.row.done:
                self._cancelled.append(ticket.row)
                self._changed.notify()

    def stuck_for(self) -> float:
        """Seconds that the present step has taken; 0 when idle."""
        started = self._step_started
        return 0.0 if started is None else time.monotonic() - started

    def check(self, stuck_after_s: float) -> None:
        """Raise RunError if the engine can't be expected to answer."""
        if not self._thread.is_alive():
            raise RunError("the engine's thread has ended")
        if self.stuck_for() > stuck_after_s:
            raise RunError(f"the engine's step has taken {self.stuck_for():.0f} s")
        if self._failures >= 3:
            raise RunError(f"the engine failed {self._failures} times in a row")

    def close(self) -> None:
        """Stop after the present step."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        if self._torch_threads is not None:
            use_torch_threads(self._torch_threads)
        while True:
            with self._changed:
                while not (self._closed or self._cancelled or self._engine.busy):
                    self._changed.wait(_IDLE_POLL_S)
                if self._closed:
                    return
                for row in self._cancelled:
                    self._engine.cancel(row)
                self._cancelled.clear()
            if self._engine.busy:
                self._step()

    def _step(self) -> None:
        self._step_started = time.monotonic()
        try:
            touched = self._engine.step()
            self._failures = 0
        except (RuntimeError, ValueError, IndexError, MemoryError):
            # Out of memory, most likely. The rows in it are lost and told so; those to come have another chance.
            _log.exception("the engine's step failed")
            self._failures += 1
            with self._changed:
                touched = self._engine.abandon()
            self._tell([(row, _LOST) for row in touched])
            return
        finally:
            self._step_started = None
        self._tell([(row, len(row.tokens)) for row in touched])

    def _tell(self, news: list[tuple[Row, int]]) -> None:
        """Hand counts to the rows' tickets, in one call per loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, int]]] = {}
        with self._changed:
            for row, count in news:
                ticket = self._tickets.get(id(row))
                if ticket is not None and (ticket.each_token or row.done or count == _LOST):
                    by_loop.setdefault(ticket.loop, []).append((ticket, count))
        for loop, updates in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put, updates)


def _put(updates: list[tuple[Ticket, int]]) -> None:
    for ticket, count in updates:
        ticket.news.put_nowait(count)
