"""Prompts of a request into token ids, within the limits of the model. Values only, for any process.

What is too long is refused as early as it is certain: by its count of messages or ids, by its length in
bytes (`token_floor.py`), and else by its count of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from flume_protos.v1 import router_pb2
from flume_protos.v1 import weight_pb2 as pb

from flume_router.chat_template import ChatOptions, Message, TemplateRefused
from flume_router.control_tokens import ShieldedText
from flume_router.errors import BadRequest, ContextTooLong
from flume_router.text_model import TextModel

Prompt = str | ShieldedText | Sequence[int]


class ModelLimits(msgspec.Struct, frozen=True):
    """What the weight nodes say of the model."""

    context_tokens: int
    vocab_size: int

    def check_prompt(self, token_ids: Sequence[int], param: str) -> None:
        """That there is one, of tokens that the model has. Raises BadRequest."""
        if not token_ids:
            raise BadRequest(f"Invalid '{param}': it has no tokens.", param=param, code="invalid_value")
        highest = max(token_ids)
        if highest >= self.vocab_size:
            raise BadRequest(
                f"Invalid '{param}': token id {highest} is not below the vocabulary's size, "
                f"{self.vocab_size}.",
                param=param,
                code="invalid_value",
            )

    def check_length(
        self, prompt_tokens: int, max_tokens: int | None, param: str, *, at_least: bool = False
    ) -> None:
        """That prompt and answer, at least one token, fit the context. Raises ContextTooLong."""
        if prompt_tokens + (max_tokens or 1) > self.context_tokens:
            raise ContextTooLong(
                self.context_tokens, prompt_tokens, max_tokens, param=param, at_least=at_least
            )

    def check_sampling(self, sampling: pb.Sampling) -> None:
        """That the token ids it names exist. Raises BadRequest."""
        for param, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            if max(ids, default=0) >= self.vocab_size:
                raise BadRequest(
                    f"Invalid '{param}': token id {max(ids)} is not below the vocabulary's size, "
                    f"{self.vocab_size}.",
                    param=param,
                    code="invalid_value",
                )


class Prompts(msgspec.Struct, frozen=True):
    """Makes prompts of the served model."""

    model: str
    text: TextModel
    parse_control_tokens: bool = False
    """Control tokens in the texts of chat messages are control tokens."""

    def render(self, messages: Sequence[Message], options: ChatOptions | None = None) -> str | ShieldedText:
        """The chat as its template writes it. Raises BadRequest."""
        options = options or ChatOptions()
        template = self.text.chat_template
        if template is None:
            raise BadRequest(
                f"The model {self.model} has no chat template; use /v1/completions.", param="messages"
            )
        if reserved := [name for name in options.variables if template.reserves(name)]:
            raise BadRequest(
                f"Invalid 'chat_template_kwargs': '{reserved[0][:64]}' is not a client's to set.",
                param="chat_template_kwargs",
                code="invalid_value",
            )
        try:
            if self.parse_control_tokens:
                return template.render(messages, options)
            return template.render_shielded(messages, options, self.text.tokenizer.control)
        except TemplateRefused as error:
            raise BadRequest(
                f"The chat template of {self.model} does not take these messages: {error}",
                param="messages",
                code="invalid_value",
            ) from error

    def encode(self, prompt: Prompt, *, rendered: bool) -> Sequence[int]:
        """Token ids. `rendered`: a chat's template has written its own BOS."""
        tokenizer = self.text.tokenizer
        if isinstance(prompt, ShieldedText):
            return tokenizer.encode_shielded(prompt)
        if not isinstance(prompt, str):
            return prompt
        ids = tokenizer.encode_now(prompt, add_special_tokens=not rendered)
        if not ids and not rendered:
            return tokenizer.document_start()
        return ids

    def check_floor(
        self, prompt: Prompt, max_tokens: int | None, limits: ModelLimits | None, param: str
    ) -> None:
        """Refuse what is certain to exceed the context however it is tokenised. Raises ContextTooLong."""
        if limits is None:
            return
        if isinstance(prompt, ShieldedText):
            prompt = prompt.text
        if isinstance(prompt, str):
            limits.check_length(self.text.tokenizer.floor.of(prompt), max_tokens, param, at_least=True)
        else:
            limits.check_length(len(prompt), max_tokens, param)

    def as_text(self, prompt: Prompt, *, skip_special_tokens: bool = True) -> str:
        """What an echo shows of it."""
        if isinstance(prompt, ShieldedText):
            return prompt.text
        if isinstance(prompt, str):
            return prompt
        return self.text.tokenizer.decode(prompt, skip_special_tokens=skip_special_tokens)


_GRPC_ROLES = ("system", "user", "assistant")


def read_grpc(
    request: router_pb2.GenerateTextRequest, prompts: Prompts, limits: ModelLimits
) -> Sequence[int]:
    """Token ids of the prompt, or of the messages, of a gRPC request. Raises BadRequest."""
    if bool(request.prompt) == bool(request.messages):
        raise BadRequest("give either prompt or messages")
    param, max_tokens = "prompt", request.sampling.max_tokens or None
    prompt: Prompt = request.prompt
    if request.messages:
        param, prompt = "messages", prompts.render(_grpc_messages(request, limits))
    prompts.check_floor(prompt, max_tokens, limits, param)
    token_ids = prompts.encode(prompt, rendered=bool(request.messages))
    limits.check_prompt(token_ids, param)
    limits.check_length(len(token_ids), max_tokens, param)
    return token_ids


def _grpc_messages(request: router_pb2.GenerateTextRequest, limits: ModelLimits) -> list[dict[str, str]]:
    if len(request.messages) > limits.context_tokens:
        raise BadRequest(f"messages: {len(request.messages)} are more than the model's context could hold")
    for index, message in enumerate(request.messages):
        if message.role not in _GRPC_ROLES:
            raise BadRequest(f"messages[{index}].role: {message.role!r} is none of {', '.join(_GRPC_ROLES)}")
    return [{"role": message.role, "content": message.content} for message in request.messages]
