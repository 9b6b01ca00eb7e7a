"""Background tasks that live exactly as long as a block of code. Built on asyncio.TaskGroup."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any


@asynccontextmanager
async def background(**coroutines: Coroutine[Any, Any, Any]) -> AsyncIterator[None]:
    """Run each coroutine, as a task of its keyword's name, while the body runs; then cancel it and wait.

    A task that fails cancels the body, and leaving the block raises the task's error. A single
    error, the body's or a task's, is raised as itself; only several come as an ExceptionGroup.
    """
    sole: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(coroutine, name=name.replace("_", "-"))
                for name, coroutine in coroutines.items()
            ]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
    except BaseExceptionGroup as errors:
        if len(errors.exceptions) > 1:
            raise
        sole = errors.exceptions[0]
    if sole is not None:
        # Outside of the handler, so that the group does not become its context.
        raise sole
