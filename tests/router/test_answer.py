"""Text, tokens and the end of one answer, whatever the weight node sends how."""

import hypothesis.strategies as st
import pytest
from flume_protos.v1 import weight_pb2 as pb
from flume_router.answer import Answer
from hypothesis import given, settings

STOP_AT_END = pb.GenerateReply(finish=pb.Finish(reason=pb.STOP, completion_tokens=99))


def grow(tokenizer, replies, stops=(), min_tokens=0):
    answer = Answer(tokenizer, stops, prompt_tokens=5, min_tokens=min_tokens)
    pieces = []
    for reply in replies:
        pieces.append(answer.push(reply))
        if pieces[-1].finished:
            break
    return pieces


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def ids_of(pieces):
    return [token.id for piece in pieces for token in piece.tokens]


def one_by_one(ids):
    return [*(pb.GenerateReply(token_ids=[i]) for i in ids), STOP_AT_END]


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.integers(0, 49151), max_size=30),
    stops=st.lists(st.text("aeiou tn", min_size=1, max_size=3), max_size=4),
    sizes=st.lists(st.integers(1, 5), min_size=30, max_size=30),
)
def test_how_tokens_are_grouped_changes_nothing(text_model, ids, stops, sizes):
    tokenizer = text_model.tokenizer
    single = grow(tokenizer, one_by_one(ids), stops)
    groups, rest = [], list(ids)
    while rest:
        size = sizes[len(groups)]
        groups.append(pb.GenerateReply(token_ids=rest[:size]))
        rest = rest[size:]
    grouped = grow(tokenizer, [*groups, STOP_AT_END], stops)
    assert text_of(grouped) == text_of(single)
    assert ids_of(grouped) == ids_of(single)
    assert grouped[-1].finished == single[-1].finished


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.integers(0, 49151), max_size=30),
    stops=st.lists(st.text("aeiou tn", min_size=1, max_size=3), max_size=4),
)
def test_shown_tokens_never_say_more_than_shown_text(text_model, ids, stops):
    tokenizer = text_model.tokenizer
    pieces = grow(tokenizer, one_by_one(ids), stops)
    text, whole = text_of(pieces), tokenizer.decode(ids)
    assert whole.startswith(text)
    assert not any(stop in text for stop in stops)
    shown = 0
    for piece in pieces:
        shown += len(piece.text)
        assert all(token.end <= shown for token in piece.tokens)
    assert ids_of(pieces) == ids[: len(ids_of(pieces))]
    if not any(stop in whole for stop in stops):
        assert (text, ids_of(pieces)) == (whole, ids)


def test_a_stop_string_ends_it_with_the_tokens_until_then(text_model):
    ids = text_model.tokenizer.encode_now("one two three four", add_special_tokens=False)
    pieces = grow(text_model.tokenizer, one_by_one(ids), [" three"])
    assert text_of(pieces) == "one two"
    finished = pieces[-1].finished
    assert (finished.reason, finished.prompt_tokens, finished.completion_tokens) == ("stop", 5, 3)


def test_a_stop_string_in_the_middle_of_a_reply_drops_the_rest(text_model):
    ids = text_model.tokenizer.encode_now("one two three four", add_special_tokens=False)
    [piece] = grow(text_model.tokenizer, [pb.GenerateReply(token_ids=ids)], ["two"])
    assert (piece.text, piece.finished.completion_tokens) == ("one ", 2)


def test_half_a_stop_string_is_shown_when_nothing_follows(text_model):
    ids = text_model.tokenizer.encode_now("one two", add_special_tokens=False)
    pieces = grow(text_model.tokenizer, one_by_one(ids), [" two three"])
    assert [piece.text for piece in pieces] == ["one", "", " two"]
    assert pieces[-1].finished.completion_tokens == 99
    assert ids_of(pieces) == ids


def test_stop_strings_wait_for_min_tokens(text_model):
    ids = text_model.tokenizer.encode_now("one two one two", add_special_tokens=False)
    pieces = grow(text_model.tokenizer, one_by_one(ids), ["two"], min_tokens=2)
    assert text_of(pieces) == "one two one "


@pytest.mark.parametrize("reason, name", [(pb.STOP, "stop"), (pb.LENGTH, "length")])
def test_reasons_have_openais_names(text_model, reason, name):
    last = pb.GenerateReply(token_ids=[100], finish=pb.Finish(reason=reason, completion_tokens=1))
    [piece] = grow(text_model.tokenizer, [last])
    assert (piece.finished.reason, piece.finished.completion_tokens) == (name, 1)


def test_an_unfinished_character_is_a_mark_at_the_end(text_model):
    ids = text_model.tokenizer.encode_now("𓀀", add_special_tokens=False)[:2]
    pieces = grow(text_model.tokenizer, one_by_one(ids))
    assert [piece.text for piece in pieces] == ["", "", "\ufffd"]


def test_the_mark_itself_may_complete_a_stop_string(text_model):
    ids = text_model.tokenizer.encode_now("𓀀", add_special_tokens=False)[:2]
    pieces = grow(text_model.tokenizer, one_by_one(ids), ["\ufffd"])
    assert (text_of(pieces), pieces[-1].finished.reason) == ("", "stop")


def test_a_token_that_a_stop_string_spells_ends_the_answer_and_is_not_shown(text_model):
    [start] = text_model.tokenizer.encode_now("<|im_start|>", add_special_tokens=False)
    answer = Answer(text_model.tokenizer, ["<|im_start|>user"], prompt_tokens=1, min_tokens=0)
    ids = text_model.tokenizer.encode_now("hi", add_special_tokens=False)
    pieces = [answer.push(pb.GenerateReply(token_ids=[i])) for i in [*ids, start]]
    assert [token.id for piece in pieces for token in piece.tokens] == ids
    for token_id in text_model.tokenizer.encode_now("user", add_special_tokens=False):
        last = answer.push(pb.GenerateReply(token_ids=[token_id]))
    assert (last.text, last.tokens, last.finished.reason) == ("", (), "stop")


def test_control_tokens_are_shown_where_they_are_not_to_be_skipped(text_model):
    ids = text_model.tokenizer.encode_now("a<|im_start|>b", add_special_tokens=False)
    answer = Answer(text_model.tokenizer, ["|>b"], prompt_tokens=1, min_tokens=0, skip_special_tokens=False)
    pieces = [answer.push(pb.GenerateReply(token_ids=[i])) for i in ids]
    assert "".join(piece.text for piece in pieces) == "a<|im_start"
    assert pieces[-1].finished.reason == "stop"
