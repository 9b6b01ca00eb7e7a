"""Pieces of text are final, and their sum is the whole."""

import hypothesis.strategies as st
from flume_router.detokenizer import Detokenizer
from hypothesis import assume, example, given, settings

IDS = st.lists(st.integers(0, 49151), max_size=40)
BYTES = st.lists(st.integers(17, 272), max_size=40)  # single bytes: broken UTF-8 of every kind


def pieces(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


@settings(max_examples=500, deadline=None)
@given(ids=IDS | BYTES)
@example(ids=[])
def test_the_pieces_add_up_to_what_transformers_decodes(text_model, reference, ids):
    assert "".join(pieces(text_model.tokenizer, ids)) == reference.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_no_piece_of_a_good_text_is_broken(text_model, spellable, text):
    assume(spellable(text))
    tokenizer = text_model.tokenizer
    ids = tokenizer.encode_now(text, add_special_tokens=False)
    ids = [i for i in ids if not tokenizer.is_special(i)]
    for piece in pieces(tokenizer, ids):
        assert "\ufffd" not in piece


def test_a_character_of_several_tokens_comes_with_its_last(text_model):
    ids = text_model.tokenizer.encode_now("a𓀀b", add_special_tokens=False)
    assert pieces(text_model.tokenizer, ids) == ["a", "", "", "", "𓀀", "b", ""]


def test_a_character_that_never_gets_complete_becomes_one_mark_at_the_end(text_model):
    ids = text_model.tokenizer.encode_now("a𓀀", add_special_tokens=False)[:-1]
    assert pieces(text_model.tokenizer, ids) == ["a", "", "", "", "\ufffd"]


def test_control_tokens_say_nothing(text_model):
    ids = text_model.tokenizer.encode_now("a<|im_end|>b", add_special_tokens=False)
    assert "".join(pieces(text_model.tokenizer, ids)) == "ab"
