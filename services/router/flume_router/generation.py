"""From a sequence request to an answer: the replies of weight nodes made into pieces.

Shared by both front doors. What goes wrong at a weight node on the way is `attempts.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import structlog
from flume_common.tasks import background

from flume_router.answer import Answer, Piece
from flume_router.attempts import Attempts
from flume_router.errors import InternalError, RouterError
from flume_router.progress import ResumeCounts, ResumeLimits
from flume_router.sequence_request import SequenceRequest
from flume_router.tokenizer import Tokenizer
from flume_router.weight_pool import WeightPool

log = structlog.get_logger(__name__)

_PIECES_AHEAD = 64  # of a slow client, before its weight nodes are held back


class Generation:
    """Answers of one model. `counts` tells how often they had to be resumed."""

    def __init__(self, pool: WeightPool, tokenizer: Tokenizer, limits: ResumeLimits) -> None:
        self.counts = ResumeCounts()
        self._pool = pool
        self._tokenizer = tokenizer
        self.limits = limits
        """Of sequences to come."""

    async def answer(self, request: SequenceRequest) -> AsyncGenerator[Piece]:
        """The last piece, and only that one, is finished. Closing it ends the call. Raises RouterError."""
        growing = Answer(
            self._tokenizer,
            request.stop,
            prompt_tokens=len(request.prompt_token_ids),
            min_tokens=request.sampling.min_tokens,
            skip_special_tokens=request.skip_special_tokens,
        )
        request.sampling.eos_token_ids[:] = self._tokenizer.end_token_ids
        attempts = Attempts(self._pool, request, self.limits, self.counts)
        async with contextlib.aclosing(attempts.replies()) as replies:
            async for reply in replies:
                try:
                    piece = growing.push(reply)
                except Exception as error:
                    log.exception("answer_not_decoded", request=request.id, token_ids=list(reply.token_ids))
                    raise InternalError("Turning tokens into text", error) from error
                yield piece
                if piece.finished:
                    return


Pieces = AsyncIterator[tuple[int, Piece]]


@contextlib.asynccontextmanager
async def merged(answers: Sequence[AsyncGenerator[Piece]]) -> AsyncIterator[Pieces]:
    """The pieces of several answers as they come, each with its answer's index, until all are finished.

    They run while the body does. The first error of any ends all, and is raised where pieces are taken.
    """
    queue: asyncio.Queue[tuple[int, Piece] | RouterError] = asyncio.Queue(_PIECES_AHEAD)
    async with background(**{f"answer_{i}": _feed(queue, i, one) for i, one in enumerate(answers)}):
        yield _taken(queue, len(answers))


async def _feed(
    queue: asyncio.Queue[tuple[int, Piece] | RouterError], index: int, pieces: AsyncGenerator[Piece]
) -> None:
    try:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                await queue.put((index, piece))
    except RouterError as error:
        await queue.put(error)


async def _taken(queue: asyncio.Queue[tuple[int, Piece] | RouterError], unfinished: int) -> Pieces:
    while unfinished:
        item = await queue.get()
        if isinstance(item, RouterError):
            raise item
        unfinished -= item[1].finished is not None
        yield item
