"""Logs of one service: an event word and fields, for people on a terminal, JSON elsewhere. Our version."""

from __future__ import annotations

import atexit
import logging
import sys
from importlib.metadata import version as distribution_version
from typing import Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from flume_common.log_rate import SUMMARY, Kind, LogRateLimit

Level = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[Level, ...] = ("debug", "info", "warning", "error")


def version() -> str:
    """Of the installed distribution."""
    return distribution_version("kernelflume")


def configure_logging(service: str, node: str, level: str = "info", stream: TextIO | None = None) -> None:
    """Log to `stream` (standard error by default), each line with `service` and `node`.

    The standard library's loggers come out in the same form. How fast it may log is bounded (see
    `flume_common.log_rate`). Raises ValueError for an unknown level.
    """
    _check_level(level)
    out = stream or sys.stderr
    shared = _shared_processors(service, node)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderer(out.isatty())],
        )
    )
    limit = LogRateLimit(_log_suppressed)
    handler.addFilter(limit)
    root = logging.getLogger()
    for earlier in root.handlers:
        _flush_at_exit(earlier, wanted=False)
    root.handlers = [handler]
    _flush_at_exit(handler, wanted=True)
    root.setLevel(level.upper())


def _log_suppressed(kind: Kind, count: int) -> None:
    log = structlog.get_logger(__name__)
    log.log(kind.level, SUMMARY, of=kind.event, logger_name=kind.logger, count=count)


def _flush_at_exit(handler: logging.Handler, *, wanted: bool) -> None:
    for limit in handler.filters:
        if isinstance(limit, LogRateLimit):
            (atexit.register if wanted else atexit.unregister)(limit.flush)


def set_level(level: str) -> None:
    """Change the level while we run. Raises ValueError for an unknown one."""
    _check_level(level)
    logging.getLogger().setLevel(level.upper())


def level() -> Level:
    """The level now; between two of ours it counts as the more talkative one."""
    number = logging.getLogger().getEffectiveLevel()
    reached: list[Level] = [name for name in LEVELS if logging.getLevelName(name.upper()) <= number]
    return reached[-1] if reached else LEVELS[0]


def _check_level(level: str) -> None:
    if level not in LEVELS:
        raise ValueError(f"log level {level!r} is not one of {', '.join(LEVELS)}")


def _shared_processors(service: str, node: str) -> list[Processor]:
    def identify(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        return {"service": service, "node": node, **event}

    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        identify,
        structlog.processors.StackInfoRenderer(),
    ]


def _renderer(terminal: bool) -> list[Processor]:
    if terminal:
        return [structlog.dev.ConsoleRenderer()]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
