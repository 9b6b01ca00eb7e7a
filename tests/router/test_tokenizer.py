"""Ids and texts are those of transformers for the same file."""

import hypothesis.strategies as st
import pytest
from flume_common.model_source import resolve_model
from flume_router.text_model import load_text_model
from flume_router.tokenizer import TokenizerError, character_of_byte, spelling_of
from hypothesis import assume, example, given, settings
from tokenizers import Tokenizer as Backend

TEXTS = [
    "",
    " ",
    "hello",
    " hello",
    "Hello, World!",
    "don't I'LL we'Ve",
    "1234567890",
    "in 2024 it was 3.14159, or 1,000,000",
    "  two  spaces  ",
    "a   1",
    "tabs\tand\t\ttabs",
    "\n\n\nlines\r\n\r\n",
    " \n \n\t x",
    "日本語のテキスト",
    "Привет, мир",
    "مرحبا بالعالم",
    "naïve café — “quotes”…",
    "e\u0301 combining",
    "🙂🙃 👩‍👩‍👧‍👦 🇩🇪",
    "𓀀𓀁 rare",
    "\u0000\u0001\u007f\u0080",
    "\u00a0\u2003\u3000 spaces",
    "\ufeffbom \ufffd",
    "<|im_start|>user\nhi<|im_end|>\n",
    "x<|endoftext|>y <|im_start|> z",
    "<|im_start|><|im_start|>",
    "<|im_start |> < |im_end|>",
    "<repo_name>a<file_sep>b<issue_start>",
    "def f(x):\n    return x ** 2  # comment\n",
    "<0x0A> ▁ Ġ",
    "a" * 5000,
    "word " * 2000,
    "é" * 3000,
]
ANYTHING = st.text(st.characters(exclude_categories=["Cs"]))
LIKELY = st.lists(
    st.sampled_from(
        ["hello", " ", "  ", "\n", "\t", "1", "23", "é", "語", "🙂", "<|im_start|>", "<|im_end|>", "'s", "."]
    )
).map("".join)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:24]))
def test_ids_are_those_of_transformers(text_model, reference, text):
    ids = text_model.tokenizer.encode_now(text, add_special_tokens=True)
    assert ids == reference(text)["input_ids"]


@settings(max_examples=400, deadline=None)
@given(text=ANYTHING | LIKELY)
def test_ids_of_any_text_are_those_of_transformers(text_model, reference, text):
    ids = text_model.tokenizer.encode_now(text, add_special_tokens=False)
    assert ids == reference(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=30))
@example(ids=[255, 254, 131])
def test_any_ids_decode_as_in_transformers(text_model, reference, ids):
    assert text_model.tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(text=ANYTHING)
def test_a_text_survives_the_way_there_and_back(text_model, spellable, text):
    assume(spellable(text))
    tokenizer = text_model.tokenizer
    ids = tokenizer.encode_now(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text


def test_special_tokens_are_known(text_model):
    tokenizer = text_model.tokenizer
    assert tokenizer.special_tokens["bos_token"] == "<|im_start|>"
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    assert [i for i in range(49152) if tokenizer.is_special(i)] == list(range(17))
    assert tokenizer.vocab_size == 49152


def test_an_id_beyond_the_vocabulary_stands_for_nothing(text_model):
    assert text_model.tokenizer.token_bytes(60_000) == b""


def test_the_byte_table_is_one_to_one():
    assert sorted(character_of_byte()) == list(range(256))
    assert len(set(character_of_byte().values())) == 256


@pytest.mark.parametrize(
    "decoder", [None, {"type": "WordPiece"}, {"type": "Sequence", "decoders": [{"type": "CTC"}]}]
)
def test_a_decoder_we_cannot_spell_is_refused_by_name(decoder):
    with pytest.raises(TokenizerError, match=r"WordPiece|CTC|none"):
        spelling_of(decoder)


@pytest.fixture(scope="session")
def hf_directory(reference, tmp_path_factory):
    """The same tokenizer saved as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("hf")
    reference.save_pretrained(directory)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


@settings(max_examples=50, deadline=None)
@given(text=LIKELY)
def test_a_directory_gives_the_same_ids(hf_directory, reference, text):
    assert (
        _loaded(hf_directory).tokenizer.encode_now(text, add_special_tokens=True)
        == reference(text)["input_ids"]
    )


_cache = {}


def _loaded(directory):
    if directory not in _cache:
        _cache[directory] = load_text_model(resolve_model(str(directory)))
    return _cache[directory]


def test_a_directory_gives_the_same_template_and_special_tokens(hf_directory, text_model):
    loaded = _loaded(hf_directory)
    assert loaded.tokenizer.special_tokens == text_model.tokenizer.special_tokens
    messages = [{"role": "user", "content": "Hi"}]
    assert loaded.chat_template.render(messages) == text_model.chat_template.render(messages)


def test_a_directory_without_tokenizer_json_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist"):
        load_text_model(resolve_model(str(tmp_path)))


def test_a_broken_tokenizer_json_says_which_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_text_model(resolve_model(str(tmp_path)))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_that_is_nested_too_deeply_is_refused(opening, file, hf_directory, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_bytes((hf_directory / "tokenizer.json").read_bytes())
    (tmp_path / file).write_text(opening * 100_000)
    with pytest.raises(TokenizerError, match=file):
        load_text_model(resolve_model(str(tmp_path)))


@pytest.mark.parametrize(
    "files, rendered",
    [
        ({"chat_template.jinja": "file"}, "file"),
        ({"tokenizer_config.json": '{"chat_template": "config"}'}, "config"),
        (
            {
                "tokenizer_config.json": '{"chat_template": [{"name": "tool_use", "template": "no"},'
                ' {"name": "default", "template": "named"}]}'
            },
            "named",
        ),
        ({"chat_template.jinja": "file", "tokenizer_config.json": '{"chat_template": "config"}'}, "file"),
        (
            {
                "tokenizer_config.json": '{"bos_token": {"content": "<|im_start|>"},'
                ' "chat_template": "{{bos_token}}"}'
            },
            "<|im_start|>",
        ),
    ],
)
def test_a_chat_template_is_found_wherever_a_directory_keeps_it(hf_directory, tmp_path, files, rendered):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_bytes((hf_directory / "tokenizer.json").read_bytes())
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    loaded = load_text_model(resolve_model(str(tmp_path)))
    assert loaded.chat_template.render([{"role": "user", "content": "Hi"}]) == rendered


def test_a_directory_that_truncates_and_pads_does_neither_here(hf_directory, tmp_path):
    backend = Backend.from_file(str(hf_directory / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text("{}")
    tokenizer = load_text_model(resolve_model(str(tmp_path))).tokenizer
    assert len(tokenizer.encode_now("one two three four", add_special_tokens=True)) == 4


def test_a_directory_may_have_no_chat_template(hf_directory, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_bytes((hf_directory / "tokenizer.json").read_bytes())
    assert load_text_model(resolve_model(str(tmp_path))).chat_template is None


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_an_end_that_is_in_no_vocabulary_is_refused_by_name(hf_directory, tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_bytes((hf_directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        f'{{"{name}_token": "<nowhere>", "add_{name}_token": true}}'
    )
    with pytest.raises(TokenizerError, match=f"{name}_token '<nowhere>' is not in the vocabulary"):
        load_text_model(resolve_model(str(tmp_path)))


def test_the_end_of_a_turn_may_be_named_by_the_tokenizer_alone(hf_directory, tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    (tmp_path / "tokenizer.json").write_bytes((hf_directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert load_text_model(resolve_model(str(tmp_path))).tokenizer.end_token_ids == (2,)


async def test_the_tokenizers_ends_are_sent_to_the_weight_node(http, weight):
    await http.post("/v1/completions", json={"model": "smollm2-135m", "prompt": "x"})
    assert list(weight.requests[0].sampling.eos_token_ids) == [2]
