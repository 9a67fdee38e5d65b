"""Run a function over many items in processes: bounded memory, a progress bar on a terminal, nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_any
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """Count the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, description: str
) -> list[Result]:
    """Give `function(item)` of every item, in the order of the items.

    Args:
        function: a function of a module, so that a spawned process finds it.
        items: at most two of them per worker are on their way at any time.
        workers: processes; with 1 everything happens in this one.
        description: what the progress bar says; it appears only where stderr is a terminal.

    Raises:
        RuntimeError: if a worker process was killed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(description, total=len(items))
        results: dict[int, Result] = {}
        if workers == 1 or len(items) < 2:
            for position, item in enumerate(items):
                results[position] = function(item)
                progress.advance(task)
            return list(results.values())
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(workers, len(items)), mp_context=context, initializer=_die_with_parent)
        try:
            running: dict[Future[Result], int] = {}
            for position, item in enumerate(items):
                running[pool.submit(function, item)] = position
                while len(running) >= 2 * workers or (running and position == len(items) - 1):
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        results[running.pop(future)] = future.result()
                        progress.advance(task)
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"{description}: a worker process was killed, probably because memory ran out. Run the same command "
                f"again with fewer workers than {workers}; what is done is kept."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return [results[position] for position in range(len(items))]


def _die_with_parent() -> None:
    """End this worker as soon as its parent is gone, which a pool does not do after SIGKILL."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch(sentinel: int) -> None:
        wait_for_any([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()
