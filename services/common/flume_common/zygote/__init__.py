"""Processes that start in milliseconds: forked from one that has imported everything (a *zygote*).

What a node imports costs seconds, every time, and is the same every time. A zygote imports it once,
touches no device, makes no UCX worker and no gRPC channel, starts no thread, and then forks on request:

    provider --Fork--> zygote --fork--> child: runs `module.main()` with its own arguments and files
             <-Forked, a pidfd--
             <-Ended, its exit code--        one connection per child, over an abstract Unix socket

What is shared stays shared in memory until written. Libraries that read an environment variable while
being loaded have read the zygote's, not the child's.

A zygote that dies takes no child with it; only exit codes are unknown from then on. Whoever finds none
raises `ZygoteUnavailable` and runs the program the slow way.

Not here: what to import (`flume_attention.zygote`) and who keeps it running (the controller's provider).
"""

from flume_common.zygote.client import ENGINE_ZYGOTE, UNKNOWN_EXIT, ForkedProcess, ZygoteUnavailable, fork
from flume_common.zygote.protocol import Fork, abstract_name, bind

__all__ = [
    "ENGINE_ZYGOTE",
    "UNKNOWN_EXIT",
    "Fork",
    "ForkedProcess",
    "ZygoteUnavailable",
    "abstract_name",
    "bind",
    "fork",
]
