"""What can go wrong with a request, for both front doors.

* RouterError
  + BadRequest              the client's mistake; repeating it cannot help
    - ContextTooLong        prompt, or prompt and answer, exceed the model's context
    - CapacityExceeded      it could never fit the KV capacity there is
  + ModelNotFound           another model than the served one was asked for
  + Unavailable             nobody can serve it now; a retry may find someone
    - Overloaded            a limit of this router is reached: requests that wait, bytes of bodies
    - NoWeightNode          no weight node is ready
    - WeightNodeLost        the weight node went away, or is leaving
      . EngineCrashed       its engine ended in a step of this sequence, which may be why
      . WeightNodeSilent    it neither sends tokens nor shows that it works
    - NoLane                the weight node has no lane to an attention node
    - NotYet                the weight node can't take the sequence at this moment
    - NotContinued          no other weight node went on with the answer
    - ShuttingDown          this router is leaving
  + DeadlineExceeded        the request took longer than it may
  + WeightNodeFailed        the weight node broke its contract or failed inside
    - SequenceFailed        what it computes for this sequence failed; another node would fail, too
  + InternalError           a defect of ours met this request; the log has the traceback
  + ReaderFailed            the process that reads large requests ended, or took too long
"""

from __future__ import annotations

from collections.abc import Sequence

from flume_common.failures import Failure


class RouterError(Exception):
    """`code` and `param` are OpenAI's: a word for programs, and the field that is at fault."""

    code: str | None = None
    param: str | None = None

    @property
    def message(self) -> str:
        return str(self)


class BadRequest(RouterError):
    """The request cannot be served as it is."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextTooLong(BadRequest):
    """The sequence would not fit the model's context; worded as OpenAI does."""

    def __init__(
        self,
        context_tokens: int,
        prompt_tokens: int,
        max_tokens: int | None,
        *,
        param: str,
        at_least: bool = False,
    ) -> None:
        """`at_least`: the prompt was refused before it was counted; it has `prompt_tokens` or more."""
        super().__init__(
            _context_message(context_tokens, prompt_tokens, max_tokens, param, at_least=at_least),
            param=param,
            code="context_length_exceeded",
        )
        self.context_tokens = context_tokens
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens


def _context_message(
    context_tokens: int, prompt_tokens: int, max_tokens: int | None, param: str, *, at_least: bool
) -> str:
    limit = f"This model's maximum context length is {context_tokens} tokens."
    known = "at least " if at_least else ""
    if prompt_tokens >= context_tokens or max_tokens is None:
        got = (
            f"your {param} resulted in {known}{prompt_tokens} tokens. "
            f"Please reduce the length of the {param}."
        )
    else:
        total = prompt_tokens + max_tokens
        got = (
            f"you requested {known}{total} tokens ({known}{prompt_tokens} in the {param}, {max_tokens} in "
            f"the completion). Please reduce the length of the {param} or completion."
        )
    return f"{limit} However, {got}"


class CapacityExceeded(BadRequest):
    """The weight node says that the sequence could never fit; the numbers are in the message."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="kv_capacity_exceeded")


class ModelNotFound(RouterError):
    """Worded as OpenAI does."""

    code = "model_not_found"
    param = "model"

    def __init__(self, model: str, served: str) -> None:
        super().__init__(
            f"The model `{model}` does not exist or you do not have access to it. This server has `{served}`."
        )
        self.model = model
        self.served = served


class Unavailable(RouterError):
    """Base of what a retry may cure."""

    code = "service_unavailable"
    retry_after_s: int = 1


class Overloaded(Unavailable):
    """Refused rather than held in a queue that only grows."""

    code = "overloaded"

    def __init__(self, reason: str, message: str, *, retry_after_s: int = 1) -> None:
        """`reason`: the limit, one word for metrics."""
        super().__init__(f"{message}; try again in {retry_after_s} s")
        self.reason = reason
        self.retry_after_s = retry_after_s


class NoWeightNode(Unavailable):
    """No weight node that serves the model is ready. `why`: what is known of each."""

    def __init__(self, model: str, why: Sequence[str] = ()) -> None:
        what = "can serve" if why else "serves"
        reasons = f": {'; '.join(why)}" if why else ""
        super().__init__(f"no weight node {what} {model} at the moment{reasons}; try again shortly")
        self.why = tuple(why)


class WeightNodeLost(Unavailable):
    """The weight node answered UNAVAILABLE or its connection broke."""

    def __init__(self, node: str, detail: str) -> None:
        super().__init__(f"weight node {node} went away: {detail}")
        self.node = node


class WeightNodeSilent(WeightNodeLost):
    """Connected still, but it has shown no progress for too long: stopped, hung or cut off."""

    def __init__(self, node: str, silence_s: float) -> None:
        super().__init__(node, f"no token and no sign of work for {silence_s:.0f} s")
        self.silence_s = silence_s


class EngineCrashed(WeightNodeLost):
    """A sequence that does this twice in a row is not sent to a third engine."""


class NoLane(Unavailable):
    """The weight node waited in vain for a lane to an attention node."""

    def __init__(self, node: str, detail: str) -> None:
        super().__init__(f"{node}: {detail}")
        self.node = node


class NotYet(Unavailable):
    """It still has an earlier attempt of this sequence, or lacks the KV that it had a moment ago."""

    def __init__(self, node: str, detail: str) -> None:
        super().__init__(f"weight node {node} cannot take the sequence yet: {detail}")
        self.node = node


class NotContinued(Unavailable):
    """`tokens`: how many of the answer were there already."""

    def __init__(self, model: str, why: str, tokens: int) -> None:
        super().__init__(f"no weight node of {model} could go on after {tokens} tokens: {why}")
        self.tokens = tokens


class ShuttingDown(Unavailable):
    """This router got its SIGTERM."""

    def __init__(self) -> None:
        super().__init__("this router is shutting down; try again")


class DeadlineExceeded(RouterError):
    """Seconds are the router's own limit on a request."""

    code = "deadline_exceeded"

    def __init__(self, deadline_s: float) -> None:
        super().__init__(f"the request took longer than the {deadline_s:g} s it may")
        self.deadline_s = deadline_s


class WeightNodeFailed(RouterError):
    """Neither the client's mistake nor worth a retry elsewhere."""

    code = "weight_node_failed"

    def __init__(self, node: str, detail: str) -> None:
        super().__init__(f"weight node {node} failed: {detail}")
        self.node = node
        self.detail = detail


class SequenceFailed(WeightNodeFailed):
    """`failure` says what: the model's output, the sequence's own processing, or the end of an engine."""

    def __init__(self, node: str, failure: Failure, detail: str) -> None:
        super().__init__(node, detail)
        self.code = failure.value
        self.failure = failure

    @property
    def message(self) -> str:
        return self.detail


class ReaderFailed(RouterError):
    """Sent again, the same request would most likely do the same."""

    code = "request_not_read"

    def __init__(self, why: str) -> None:
        super().__init__(f"the request could not be read: {why}")


class InternalError(RouterError):
    """`what` we were doing when an exception that nothing expects came."""

    code = "internal_error"

    def __init__(self, what: str, error: Exception) -> None:
        super().__init__(f"{what} failed: {type(error).__name__}")
