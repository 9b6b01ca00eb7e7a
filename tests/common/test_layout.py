from dataclasses import fields, replace

import pytest
from flume_common.layout import DTYPE_BYTES, KvLayout, LayoutMismatch

LAYOUT = KvLayout(
    num_layers=30, num_query_heads=9, num_kv_heads=3, head_dim=64, dtype="float32", block_tokens=16
)
OTHER = {
    "num_layers": 31,
    "num_query_heads": 18,
    "num_kv_heads": 9,
    "head_dim": 65,
    "dtype": "bfloat16",
    "block_tokens": 32,
}


def test_sizes_follow_from_the_shapes():
    assert LAYOUT.group == 3
    assert LAYOUT.layer_token_bytes == 2 * 3 * 64 * 4
    assert LAYOUT.token_bytes == 30 * 2 * 3 * 64 * 4
    assert LAYOUT.block_bytes == 16 * LAYOUT.token_bytes
    assert replace(LAYOUT, dtype="bfloat16").token_bytes * 2 == LAYOUT.token_bytes


@pytest.mark.parametrize("tokens, blocks", [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_a_block_is_taken_by_its_first_token(tokens, blocks):
    assert LAYOUT.blocks_of(tokens) == blocks


@pytest.mark.parametrize("field", [field.name for field in fields(KvLayout)])
def test_any_difference_is_named_and_changes_the_hash(field):
    theirs = replace(LAYOUT, **{field: OTHER[field]})
    assert theirs.hash != LAYOUT.hash
    with pytest.raises(LayoutMismatch, match=field) as caught:
        LAYOUT.require_same(theirs)
    assert (caught.value.field, caught.value.theirs) == (field, OTHER[field])


def test_equal_layouts_pass():
    LAYOUT.require_same(replace(LAYOUT))


def test_a_layout_survives_the_wire():
    assert KvLayout.from_proto(LAYOUT.to_proto()) == LAYOUT


def test_a_sender_whose_hash_disagrees_with_its_fields_is_refused():
    message = LAYOUT.to_proto()
    message.head_dim = 128
    with pytest.raises(LayoutMismatch, match="hash"):
        KvLayout.from_proto(message)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dtype": "float64"}, "float64"),
        ({"num_layers": 0}, "num_layers"),
        ({"block_tokens": 0}, "block_tokens"),
        ({"num_query_heads": 10}, "not a multiple"),
    ],
)
def test_an_impossible_layout_is_refused_with_the_field(change, words):
    with pytest.raises(ValueError, match=words):
        replace(LAYOUT, **change)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_element_sizes_are_numpys_or_half_of_float32(dtype):
    assert replace(LAYOUT, dtype=dtype).itemsize == (4 if dtype == "float32" else 2)
