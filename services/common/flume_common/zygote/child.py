"""What a forked child does first: become a process as if it had been run on its own."""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from setproctitle import setproctitle

from flume_common.zygote.protocol import Fork

_STANDARD = 2  # output and error come first


def become(request: Fork, fds: Sequence[int], env: Mapping[str, str]) -> NoReturn:
    """Run what was asked for and end with its exit code. The zygote's own files are closed before.

    `env` holds defaults for the environment.
    """
    code = 1
    try:
        join_group(0, request.group)
        _reset_signals()
        _take_files(fds[:_STANDARD])
        further = zip(request.fd_flags, map(str, fds[_STANDARD:]), strict=True)
        args = [word for pair in further for word in pair] + request.args
        sys.argv = [request.module, *args]
        # Before the environment changes: the title is written over where that lies.
        setproctitle(" ".join((sys.executable, "-m", request.module.removesuffix(".__main__"), *args)))
        os.environ.clear()
        os.environ.update(env)
        os.environ.update(request.env)
        reseed()
        code = run(request.module)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        # Not sys.exit: what lies further up on the stack is the zygote's.
        os._exit(code)


def join_group(pid: int, group: int) -> None:
    """Put a process (0: ourselves) into that group, or one of its own where that lies in another session."""
    try:
        os.setpgid(pid, group or pid)
    except PermissionError:
        os.setpgid(pid, pid)


def run(module: str) -> int:
    """The exit code that `python -m module` would have."""
    try:
        result = importlib.import_module(module).main()
    except SystemExit as end:
        result = end.code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if isinstance(result, str):
        print(result, file=sys.stderr)
        return 1
    return int(result or 0)


def reseed() -> None:
    """Random numbers of our own, or siblings would draw the same ones."""
    random.seed()
    modules: dict[str, Any] = sys.modules
    if "numpy" in modules:
        modules["numpy"].random.seed()
    if "torch" in modules:
        modules["torch"].seed()


def _reset_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The kernel sends it to a stopped process that the zygote's end leaves an orphan.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _take_files(output: Sequence[int]) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    for number, fd in enumerate((null, *output)):
        os.dup2(fd, number)
        os.close(fd)
