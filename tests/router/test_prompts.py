"""Prompts into token ids, and what is refused on the way: what needs the tokenizer but no cluster."""

import pytest
from flume_protos.v1 import router_pb2
from flume_router.chat_template import ChatTemplate
from flume_router.errors import BadRequest, ContextTooLong
from flume_router.prompts import ModelLimits, Prompts, read_grpc
from flume_router.text_model import TextModel
from flume_router.tokenizer import Tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

LIMITS = ModelLimits(context_tokens=10, vocab_size=5)
CHAT = [{"role": "user", "content": "ab"}]


@pytest.fixture
def prompts():
    """Of a model that puts <s> before every text, and whose template does so too."""
    backend = Backend(models.BPE(vocab={"<s>": 0, "a": 1, "b": 2, ":": 3}, merges=[]))
    backend.add_special_tokens(["<s>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    template = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}:{% endfor %}", {"bos_token": "<s>"}
    )
    return Prompts("m", TextModel(Tokenizer(backend, {"bos_token": "<s>"}), template))


def test_a_text_gets_the_beginning_its_model_wants(prompts):
    assert prompts.encode("ab", rendered=False) == [0, 1, 2]


def test_a_chat_begins_only_once(prompts):
    assert prompts.encode(prompts.render(CHAT), rendered=True) == [0, 1, 2, 3]


def test_token_ids_are_taken_as_they_are(prompts):
    assert prompts.encode((3, 1), rendered=False) == (3, 1)


def test_a_model_without_a_template_has_no_chats(prompts):
    plain = Prompts("m", TextModel(prompts.text.tokenizer, None))
    with pytest.raises(BadRequest, match="m has no chat template; use /v1/completions"):
        plain.render(CHAT)


@pytest.mark.parametrize("prompt_tokens, max_tokens", [(9, None), (9, 1), (1, 9), (5, 5)])
def test_what_fits_the_context_is_taken(prompt_tokens, max_tokens):
    LIMITS.check_length(prompt_tokens, max_tokens, "prompt")


@pytest.mark.parametrize("prompt_tokens, max_tokens", [(10, None), (10, 1), (1, 10), (5, 6), (11, 1)])
def test_what_does_not_is_refused(prompt_tokens, max_tokens):
    with pytest.raises(ContextTooLong, match="maximum context length is 10 tokens"):
        LIMITS.check_length(prompt_tokens, max_tokens, "prompt")


def test_prompts_are_made_of_known_tokens():
    LIMITS.check_prompt([0, 4], "prompt")
    for ids in ([], [0, 5]):
        with pytest.raises(BadRequest):
            LIMITS.check_prompt(ids, "prompt")


def test_what_is_certainly_too_long_is_refused_before_it_is_tokenised(prompts):
    # The longest token is <s>, of 3 bytes: 28 bytes are at least 10 tokens, 27 may be 9.
    prompts.check_floor("a" * 27, None, LIMITS, "prompt")
    with pytest.raises(ContextTooLong, match="your prompt resulted in at least 10 tokens"):
        prompts.check_floor("a" * 28, None, LIMITS, "prompt")
    with pytest.raises(ContextTooLong, match=r"at least 14 tokens \(at least 9 in the prompt, 5 in the comp"):
        prompts.check_floor("a" * 27, 5, LIMITS, "prompt")
    with pytest.raises(ContextTooLong, match="your prompt resulted in 10 tokens"):
        prompts.check_floor([1] * 10, None, LIMITS, "prompt")
    prompts.check_floor("a" * 1000, None, None, "prompt")


def grpc_request(**fields):
    return router_pb2.GenerateTextRequest(**fields)


def test_a_grpc_prompt_is_read_with_the_same_limits(prompts):
    assert read_grpc(grpc_request(prompt="ab"), prompts, LIMITS) == [0, 1, 2]
    message = router_pb2.ChatMessage(role="user", content="ab")
    assert read_grpc(grpc_request(messages=[message]), prompts, LIMITS) == [0, 1, 2, 3]
    with pytest.raises(ContextTooLong, match="your prompt resulted in at least 34 tokens"):
        read_grpc(grpc_request(prompt="a" * 100), prompts, LIMITS)
    with pytest.raises(BadRequest, match="messages: 11 are more than"):
        read_grpc(grpc_request(messages=[message] * 11), prompts, LIMITS)
    for wrong in (grpc_request(), grpc_request(prompt="a", messages=[message])):
        with pytest.raises(BadRequest, match="either prompt or messages"):
            read_grpc(wrong, prompts, LIMITS)
