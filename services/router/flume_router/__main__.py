"""`python -m flume_router`: settings, the model's text side, a socket, then `serve`."""

from __future__ import annotations

import asyncio
import socket
import sys
from contextlib import suppress

from flume_common.listening import bind
from flume_common.model_source import ModelSource, ModelSourceError, resolve_model
from flume_common.serving import CannotListen, stop_event
from flume_common.store import StoreError
from flume_common.tasks import background
from flume_common.telemetry import configure_logging

from flume_router.chat_template import TemplateBroken
from flume_router.config import RouterConfig, parse
from flume_router.serve import serve
from flume_router.text_model import TextModel, load_text_model
from flume_router.tokenizer import TokenizerError


def main() -> int:
    """The exit status: 0 after a signal, 1 with one line that says what is wrong and which flag to turn."""
    try:
        config = parse()
        configure_logging("router", config.node, config.log_level)
        source = resolve_model(config.model)
        text = load_text_model(source)
        bound = bind(config.listen_http)
        asyncio.run(_run(config, source, text, bound))
    except ValueError as error:
        return _fail(str(error))
    except (ModelSourceError, TokenizerError, TemplateBroken) as error:
        return _fail(f"--model: {error}")
    except CannotListen as error:
        return _fail(f"{error}; choose another address with --listen-http or --listen-grpc")
    except StoreError as error:
        return _fail(f"--etcd: {error}")
    return 0


class _StoppedEarly(Exception):
    """A signal came while we were still waiting to be let in."""


async def _run(config: RouterConfig, source: ModelSource, text: TextModel, bound: socket.socket) -> None:
    stop, serving = stop_event(), asyncio.Event()
    with suppress(_StoppedEarly):
        async with background(early_stop=_end_start(stop, serving)):
            await serve(config, source, text, bound, serving=serving, stop=stop, prestart=True)


async def _end_start(stop: asyncio.Event, serving: asyncio.Event) -> None:
    """Waiting for etcd may take for ever, so a signal must end it; later, `serve` sees to signals."""
    await stop.wait()
    if not serving.is_set():
        raise _StoppedEarly


def _fail(message: str) -> int:
    print(f"flume_router: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
