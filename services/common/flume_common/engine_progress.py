"""What an engine is doing right now, in one page of memory that it shares with its supervisor.

The engine writes plain words as it goes: between layers, tensors, captures and turns of its loop, without a
system call. The supervisor reads them whenever it is asked, so that a question about an engine never waits
for the engine, and an engine that works for minutes is not taken for one that hangs: only the absence of
progress counts. Words are read one by one while they may change, which is good enough to show and to judge.

Preparation (imports, a model on a slow disk, kernels being compiled) has parts of which the engine sees
neither beginning nor end; there, the process itself says from beside whether it works: `work_done`.
"""

from __future__ import annotations

import mmap
import os
import time
from enum import IntEnum
from pathlib import Path

import msgspec
from flume_protos.v1 import common_pb2

PAGE_BYTES = mmap.PAGESIZE


class Activity(IntEnum):
    """What the engine does."""

    STARTING = 0  # imports, device, lanes' worker
    LOADING = 1  # tensors of the model
    PREPARING = 2  # captures, compiles or allocates what later steps need
    IDLE = 3
    STEPPING = 4  # a forward pass


class _Word(IntEnum):
    """Places of int64 words in the page."""

    BEAT_NS = 0  # monotonic; of the last progress
    ACTIVITY = 1
    SINCE_NS = 2  # monotonic; when that began
    DONE = 3  # LOADING: bytes; PREPARING: parts; STEPPING: layers
    TOTAL = 4
    STEP = 5
    PREFILL_TOKENS = 6  # of the step under way
    SEQUENCES = 7
    AWAITED = 8  # 1 while the step waits for another node
    MOVED = 9  # pieces of KV read from other nodes


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of the page; the times are seconds before it."""

    activity: Activity
    activity_s: float
    """How long that has lasted."""
    quiet_s: float
    """Since the last progress."""
    done: int = 0
    total: int = 0
    step: int = 0
    """Number of the step under way, or of the last one."""
    prefill_tokens: int = 0
    sequences: int = 0
    awaited: bool = False
    moved: int = 0
    """Pieces of KV read from other nodes since the engine started."""

    @property
    def preparing(self) -> bool:
        """True while the engine may be busy with what it cannot report on."""
        return self.activity < Activity.IDLE


class ProgressPage:
    """The page. An engine writes to it, its supervisor calls `read`."""

    def __init__(self, fd: int = -1) -> None:
        """`fd` is a memory file of at least a page, which is closed; without one the page is private."""
        if fd < 0:
            self._memory = mmap.mmap(-1, PAGE_BYTES)
        else:
            self._memory = mmap.mmap(fd, PAGE_BYTES)
            os.close(fd)
        self._words = memoryview(self._memory).cast("q")

    def beat(self) -> None:
        """Progress was made."""
        self._words[_Word.BEAT_NS] = time.monotonic_ns()

    def begin(self, activity: Activity, total: int = 0) -> None:
        """Something else begins, in so many parts."""
        words, now_ns = self._words, time.monotonic_ns()
        words[_Word.BEAT_NS] = now_ns
        words[_Word.DONE], words[_Word.TOTAL] = 0, total
        words[_Word.SINCE_NS] = now_ns
        words[_Word.ACTIVITY] = activity

    def begin_step(self, step: int, layers: int, prefill_tokens: int, sequences: int) -> None:
        words = self._words
        words[_Word.STEP] = step
        words[_Word.PREFILL_TOKENS], words[_Word.SEQUENCES] = prefill_tokens, sequences
        self.begin(Activity.STEPPING, layers)

    def reached(self, done: int, total: int = 0) -> None:
        """So many parts of what is under way are done; `total` where it was not known before."""
        words = self._words
        words[_Word.DONE] = done
        if total:
            words[_Word.TOTAL] = total
        words[_Word.BEAT_NS] = time.monotonic_ns()

    def await_node(self, awaited: bool) -> None:
        """Whether another node is waited for: time that counts for that node, not for this engine."""
        words = self._words
        words[_Word.AWAITED] = awaited
        words[_Word.BEAT_NS] = time.monotonic_ns()

    def move(self) -> None:
        """Another piece of KV was read from another node."""
        words = self._words
        words[_Word.MOVED] += 1
        words[_Word.BEAT_NS] = time.monotonic_ns()

    def turn(self) -> None:
        """Progress; an engine that looks for messages has started."""
        if self._words[_Word.ACTIVITY] < Activity.IDLE:
            self.begin(Activity.IDLE)
        else:
            self.beat()

    def idle(self) -> None:
        """Progress, and nothing is under way. Cheap where that is known already."""
        if self._words[_Word.ACTIVITY] == Activity.IDLE:
            self.beat()
        else:
            self.begin(Activity.IDLE)

    @property
    def beat_ns(self) -> int:
        """The last progress, by a clock of its own: two readings that are equal mean that there was none."""
        return self._words[_Word.BEAT_NS]

    def read(self) -> Progress:
        words, now_ns = self._words, time.monotonic_ns()
        return Progress(
            activity=Activity(words[_Word.ACTIVITY]),
            activity_s=max(0, now_ns - words[_Word.SINCE_NS]) / 1e9,
            quiet_s=max(0, now_ns - words[_Word.BEAT_NS]) / 1e9,
            done=words[_Word.DONE],
            total=words[_Word.TOTAL],
            step=words[_Word.STEP],
            prefill_tokens=words[_Word.PREFILL_TOKENS],
            sequences=words[_Word.SEQUENCES],
            awaited=bool(words[_Word.AWAITED]),
            moved=words[_Word.MOVED],
        )


def activity_message(progress: Progress) -> common_pb2.EngineActivity:
    """The reading as the API shows it."""
    return common_pb2.EngineActivity(
        activity=progress.activity.name,
        activity_s=progress.activity_s,
        quiet_s=progress.quiet_s,
        done=progress.done,
        total=progress.total,
        step=progress.step,
        prefill_tokens=progress.prefill_tokens,
        sequences=progress.sequences,
        awaits_node=progress.awaited,
    )


def make_page() -> tuple[ProgressPage, int]:
    """A page in its starting state, and a descriptor of it for the engine's process, to be closed."""
    fd = os.memfd_create("flume-progress")
    try:
        os.ftruncate(fd, PAGE_BYTES)
        page = ProgressPage(os.dup(fd))
    except BaseException:
        os.close(fd)
        raise
    page.begin(Activity.STARTING)
    return page, fd


def work_done(pid: int) -> int:
    """A number that grows while the process computes or reads files, by whatever code; 0 when it is gone.

    Clock ticks of processor time, its ended children's included, major page faults, and MiB read from disk.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        major_faults, ticks = int(fields[9]), sum(int(field) for field in fields[11:15])
        io = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        return ticks + major_faults + (int(io["read_bytes"]) >> 20)
    except (OSError, ValueError, KeyError, IndexError):
        return 0
