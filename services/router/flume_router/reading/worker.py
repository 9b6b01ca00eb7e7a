"""A process that reads large requests, one after the other: `python -m flume_router.reading.worker`.

Frames come on standard input and leave on standard output; it ends with its input, so with its router.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
from pathlib import Path
from typing import BinaryIO

from flume_common.model_source import ModelSource, ModelSourceError
from flume_protos.v1 import router_pb2

from flume_router.chat_template import TemplateBroken
from flume_router.errors import RouterError
from flume_router.http import job as jobs
from flume_router.http.errors import HttpError
from flume_router.prompts import Prompts, read_grpc
from flume_router.reading import frames
from flume_router.reading.identity import identity
from flume_router.text_model import load_text_model
from flume_router.tokenizer import TokenizerError

_NICENESS = 5  # streams go first where there are too few cores
_KEPT_BYTES = 64 << 20  # memory that may stay with us between two requests, beyond what we began with
_PAGE = resource.getpagesize()


def main() -> None:
    """Until the input ends, or what a request left behind is best given back by ending."""
    # What is printed by accident must not get between frames.
    orders, replies = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; our router says when it is over
    os.nice(_NICENESS)
    setup = _read(orders)
    if not isinstance(setup, frames.Setup):
        return
    prompts = _prompts(setup)
    if isinstance(prompts, frames.Failed):
        _write(replies, prompts)
        return
    _write(replies, frames.Ready())
    gc.freeze()
    began_with = _resident_bytes()
    while isinstance(task := _read(orders), frames.Task):
        _write(replies, answer(task, prompts))
        del task
        if _resident_bytes() - began_with > _KEPT_BYTES and not _given_back(began_with):
            return


def _prompts(setup: frames.Setup) -> Prompts | frames.Failed:
    source = ModelSource(Path(setup.path), setup.kind, setup.name)
    try:
        text = load_text_model(source)
    except (ModelSourceError, TokenizerError, TemplateBroken) as error:
        return frames.Failed(str(error))
    if identity(source) != setup.identity:
        return frames.Failed(f"the files of {source.path} changed since this router started; restart it")
    return Prompts(setup.model, text, setup.parse_control_tokens)


def answer(task: frames.Task, prompts: Prompts) -> frames.Reply:
    """What a task comes to."""
    try:
        if task.kind == "grpc":
            request = router_pb2.GenerateTextRequest.FromString(task.data)
            return frames.PromptRead(frames.pack_ids(read_grpc(request, prompts, task.limits)))
        draft = jobs.draft(jobs.Kind(task.kind), task.data, prompts, task.limits)
        return frames.job_read(jobs.finish(draft, prompts, task.limits))
    except (RouterError, HttpError) as error:
        return frames.refusal_of(error)
    except Exception as error:  # a defect: this request's alone
        return frames.Failed(f"{type(error).__name__}: {error}")


def _read(orders: BinaryIO) -> frames.Setup | frames.Task | None:
    head = orders.read(frames.LENGTH.size)
    if len(head) < frames.LENGTH.size:
        return None
    return frames.decode_order(orders.read(frames.LENGTH.unpack(head)[0]))


def _write(replies: BinaryIO, frame: frames.Reply) -> None:
    replies.write(frames.encode(frame))
    replies.flush()


def _given_back(began_with: int) -> bool:
    """Whether the allocator could return enough to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
    return _resident_bytes() - began_with <= _KEPT_BYTES


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


if __name__ == "__main__":
    main()
