"""Prompts into token ids: what needs the tokenizer but no cluster."""

import pytest
from flume_protos.v1 import weight_pb2 as pb
from flume_router.chat_template import ChatTemplate
from flume_router.errors import BadRequest, ContextTooLong
from flume_router.generation import Generation
from flume_router.in_flight import InFlight
from flume_router.progress import ResumeLimits
from flume_router.sequence_request import SequenceRequest
from flume_router.service import Service, sequences, wrapped
from flume_router.text_model import TextModel
from flume_router.tokenizer import Tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors


class Pool:
    """Numbers of weight nodes that are not there."""

    context_tokens = 10
    vocab_size = 5


def service_of(text):
    pool = Pool()
    return Service("m", text, pool, Generation(pool, text.tokenizer, ResumeLimits()), InFlight(1), 0.0)


@pytest.fixture
def service():
    """Of a model that puts <s> before every text, and whose template does so too."""
    backend = Backend(models.BPE(vocab={"<s>": 0, "a": 1, "b": 2, ":": 3}, merges=[]))
    backend.add_special_tokens(["<s>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    template = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}:{% endfor %}", {"bos_token": "<s>"}
    )
    text = TextModel(Tokenizer(backend, {"bos_token": "<s>"}), template)
    return service_of(text)


async def test_a_text_gets_the_beginning_its_model_wants(service):
    assert await service.text_prompt("ab") == [0, 1, 2]


async def test_a_chat_begins_only_once(service):
    assert await service.chat_prompt([{"role": "user", "content": "ab"}]) == [0, 1, 2, 3]


async def test_a_model_without_a_template_has_no_chats(service):
    plain = service_of(TextModel(service.text.tokenizer, None))
    with pytest.raises(BadRequest, match="m has no chat template; use /v1/completions"):
        await plain.chat_prompt([{"role": "user", "content": "ab"}])


@pytest.mark.parametrize("prompt_tokens, max_tokens", [(9, None), (9, 1), (1, 9), (5, 5)])
def test_what_fits_the_context_is_taken(service, prompt_tokens, max_tokens):
    service.check_length(prompt_tokens, max_tokens, "prompt")


@pytest.mark.parametrize("prompt_tokens, max_tokens", [(10, None), (10, 1), (1, 10), (5, 6), (11, 1)])
def test_what_does_not_is_refused(service, prompt_tokens, max_tokens):
    with pytest.raises(ContextTooLong, match="maximum context length is 10 tokens"):
        service.check_length(prompt_tokens, max_tokens, "prompt")


def test_prompts_are_made_of_known_tokens(service):
    service.check_prompt([0, 4], "prompt")
    for ids in ([], [0, 5]):
        with pytest.raises(BadRequest):
            service.check_prompt(ids, "prompt")


def test_sequences_count_their_ids_and_seeds_up():
    base = SequenceRequest("r", (), pb.Sampling(seed=2**63 - 1), ("x",), 1.0, {})
    made = list(sequences(base, [[1], [2]], 2))
    assert [one.id for one in made] == ["r-0", "r-1", "r-2", "r-3"]
    assert [list(one.prompt_token_ids) for one in made] == [[1], [1], [2], [2]]
    assert [one.sampling.seed for one in made] == [2**63 - 1, -(2**63)] * 2
    assert {one.stop for one in made} == {("x",)}


def test_a_single_sequence_keeps_the_requests_id():
    [one] = sequences(SequenceRequest("r", (), pb.Sampling(), (), 1.0, {}), [[1]], 1)
    assert one.id == "r"
    assert not one.sampling.HasField("seed")


def test_numbers_wrap_into_int64():
    assert [wrapped(n) for n in (0, -1, 2**63 - 1, 2**63, -(2**63))] == [0, -1, 2**63 - 1, -(2**63), -(2**63)]
