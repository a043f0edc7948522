"""Records of served requests, written to the catalog in batches by a thread of its own, never on the path of a request."""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

BATCH = 500
EVERY_S = 0.5
WAITING = 20_000  # records; more are counted as lost rather than kept in memory without bound


class Journal:
    """`write(rows)` gets the records; `lost` tells how many it never got."""

    def __init__(self, write: Callable[[Sequence[Mapping[str, Any]]], None]) -> None:
        self.write = write
        self.lost = 0
        self.rows: queue.Queue[Mapping[str, Any] | None] = queue.Queue(WAITING)
        self.thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self.thread.start()

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a record for the next batch; never waits."""
        try:
            self.rows.put_nowait(row)
        except queue.Full:
            self.lost += 1

    def close(self) -> None:
        """Write what is left and end the thread."""
        self.rows.put(None)
        self.thread.join()

    def _work(self) -> None:
        batch: list[Mapping[str, Any]] = []
        while True:
            try:
                row = self.rows.get(timeout=EVERY_S if batch else None)
            except queue.Empty:
                self._flush(batch)
                continue
            if row is not None:
                batch.append(row)
            if row is None or len(batch) >= BATCH:
                self._flush(batch)
            if row is None:
                return

    def _flush(self, batch: list[Mapping[str, Any]]) -> None:
        try:
            self.write(batch)
        except Exception:  # noqa: BLE001  (a full disk or a locked database must not end the server; the metric tells)
            self.lost += len(batch)
        batch.clear()
