"""One thread owns the model; the event loop talks to it through two queues.

    event loop ── submit, call, cancel ──► inbox ──► thread: engine.step()
        ▲                                                │
        └────── one hop per step, with all events ◄──────┘

Nothing else touches the model while the worker runs, so the engine needs no locks, and the loop never waits for arithmetic.
"""

import asyncio
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeAlias, TypeVar

from ownlm.generate import beams
from ownlm.generate.adapters import Adapter
from ownlm.generate.beams import Searches
from ownlm.generate.engine import Engine
from ownlm.generate.model import Model
from ownlm.generate.parallel import RankLost
from ownlm.generate.sampling import Sampling
from ownlm.generate.sequence import Event

T = TypeVar("T")
Batch: TypeAlias = list[tuple[int, Event]]


class EngineFault(Exception):
    """The engine broke while it worked on a request; the request is lost, the server goes on."""


class Ticket:
    """The answers to one HTTP request, several to each of its prompts. Lives on the event loop."""

    def __init__(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        self.prompts, self.sampling = prompts, sampling
        self.answers = self.open = len(prompts) * sampling.answers
        self.queue: asyncio.Queue[Batch | EngineFault] = asyncio.Queue()
        self.requests: list[int] = []  # the engine's ids; the worker thread writes them

    async def batches(self) -> AsyncIterator[Batch]:
        """(choice, event) pairs, one list per step, until all answers have ended. Choice = prompt * answers to each + answer."""
        while self.open:
            batch = await self.queue.get()
            if isinstance(batch, EngineFault):
                raise batch
            self.open -= sum(event.finish_reason is not None for _, event in batch)
            yield batch


class Worker:
    """Starts with `start`, ends with `stop`; everything else may be called from the event loop at any time."""

    def __init__(self, model: Model, *, slots: int) -> None:
        self.model = model
        self.lost: RankLost | None = None  # why nothing can run here any more
        self.on_lost: Callable[[], None] = lambda: None  # called then, from the thread
        self.engine: Engine = model.engine(slots)
        self.searches = Searches(self.engine)
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.tickets: dict[int, tuple[Ticket, int]] = {}  # engine's id -> whose, which prompt
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.faults = 0

    def start(self) -> None:
        """Begin work for the running event loop."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self) -> None:
        """End the thread after its current step; what is unfinished is dropped."""
        self.inbox.put(None)
        self.thread.join()

    @property
    def alive(self) -> bool:
        return self.thread.is_alive()

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        adapter: Adapter | None = None,
        tenant: str = "",
        priority: int = 0,
        deadline: float | None = None,
    ) -> Ticket:
        """Queue the prompts of a tenant; the rest as `Engine.add` has it. Of a search over beams all events come at its end. Raises
        ContextTooLong or UserError at once, in the caller's thread; EngineFault when the model is lost."""
        if self.lost is not None:
            raise EngineFault(str(self.lost))
        for prompt in prompts:
            if sampling.beams > 1:
                self.searches.check(prompt, sampling)
            else:
                self.engine.check(prompt, sampling, adapter)
        ticket, came = Ticket(prompts, sampling), time.monotonic()

        def begin() -> None:
            left = None if deadline is None else deadline - (time.monotonic() - came)
            for index, prompt in enumerate(prompts):
                if sampling.beams > 1:
                    request = self.searches.add(prompt, sampling)
                else:
                    request = self.engine.add(
                        prompt, sampling, adapter=adapter, tenant=tenant, priority=priority, deadline=left
                    )
                ticket.requests.append(request)
                self.tickets[request] = (ticket, index)

        self.inbox.put(begin)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Drop what is left of a ticket; its slots are free before the next step."""

        def drop() -> None:
            for request in ticket.requests:
                self.engine.cancel(request)
                self.searches.cancel(request)
                self.tickets.pop(request, None)

        self.inbox.put(drop)

    async def call(self, function: Callable[[], T]) -> T:
        """The result of a function that runs between two steps (embeddings use the model too)."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as fault:
                future.set_exception(fault)
                if isinstance(fault, RankLost):
                    raise

        self.inbox.put(run)
        return await asyncio.wrap_future(future)

    def _work(self) -> None:
        try:
            while True:
                # Sleep when there is nothing to do; between steps only take what is there.
                while (self.engine.idle and self.searches.idle) or not self.inbox.empty():
                    command = self.inbox.get()
                    if command is None:
                        return
                    command()
                    del command  # with all that it holds, such as an adapter
                self._step()
        except RankLost as fault:
            self.lost = fault
            self._fail(str(fault))
            self.on_lost()

    def _step(self) -> None:
        try:
            events = [] if self.engine.idle else self.engine.step()
            for request, found in [] if self.searches.idle else self.searches.step():
                ticket, place = self.tickets[request]
                events += beams.events(self.model.tokenizer, ticket.prompts[place], ticket.sampling, request, found)
        except RankLost:
            raise
        except Exception as fault:  # noqa: BLE001  (a broken step must not end the server)
            self._recover(fault)
        else:
            self._deliver(events)

    def _deliver(self, events: list[Event]) -> None:
        """Hand one step's events to their tickets, in one hop to the event loop."""
        batches: dict[Ticket, Batch] = {}
        for event in events:
            ticket, prompt = self.tickets[event.request]
            batches.setdefault(ticket, []).append((prompt * ticket.sampling.answers + event.index, event))
        if batches:
            self._on_loop(batches)
        ended = {event.request for event in events if event.finish_reason}
        if ended:
            for request in ended - {sequence.request for sequence in (*self.engine.running, *self.engine.waiting)}:
                del self.tickets[request]

    def _recover(self, fault: Exception) -> None:
        """Fail what was running and begin again with an empty engine."""
        self.faults += 1
        traceback.print_exception(fault)
        self._fail("The engine failed on this request.")
        self.engine = self.model.engine(self.engine.slots)
        self.searches = Searches(self.engine)

    def _fail(self, why: str) -> None:
        lost = {ticket for ticket, _ in self.tickets.values()}
        self.tickets.clear()
        self._on_loop(dict.fromkeys(lost, EngineFault(why)))

    def _on_loop(self, news: Mapping[Ticket, Batch | EngineFault]) -> None:
        def deliver() -> None:
            for ticket, item in news.items():
                ticket.queue.put_nowait(item)

        assert self.loop is not None, "the worker was not started"
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(deliver)
