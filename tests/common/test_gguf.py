"""GGUF headers: read as the gguf package reads them, or refused with the place and the reason."""

import struct

import gguf
import pytest
from flume_common.gguf import MAX_ARRAY_DEPTH, GgufError, map_file, read_fields, read_header

UINT8, UINT32, STRING, ARRAY = 0, 4, 8, 9


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def header(fields, *, num_fields=None, tensors=b"", num_tensors=0):
    count = len(fields) if num_fields is None else num_fields
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, count) + b"".join(fields) + tensors


def nested(depth, count=1):
    """A field whose value is `depth` arrays within each other; the innermost has one byte."""
    heads = struct.pack("<IQ", ARRAY, count) * (depth - 1)
    return text("k") + struct.pack("<I", ARRAY) + heads + struct.pack("<IQB", UINT8, 1, 7)


@pytest.fixture
def file(tmp_path):
    def write(data):
        path = tmp_path / "m.gguf"
        path.write_bytes(data)
        return path

    return write


def both(path):
    """The two ways to read a file: all metadata, and the short arrays only with the tensors."""
    yield lambda: read_fields(path)
    yield lambda: read_header(path, map_file(path), longest_array=4)


def refused(path, *words):
    for read in both(path):
        with pytest.raises(GgufError) as caught:
            read()
        for word in (str(path), *words):
            assert word in str(caught.value), caught.value


def test_fields_and_tensors_are_those_that_the_gguf_package_writes(tmp_path):
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint32("a", 7)
    writer.add_float64("b", 0.5)
    writer.add_bool("c", True)
    writer.add_string("d", "größe")
    writer.add_array("e", [1, 2, 3])
    writer.add_array("f", [f"token {n}" for n in range(9)])
    writer.add_tensor("t", np.zeros((3, 5), np.float32))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    wanted = {"general.architecture": "llama", "a": 7, "b": 0.5, "c": True, "d": "größe", "e": [1, 2, 3]}
    assert read_fields(tmp_path / "m.gguf") == wanted | {"f": [f"token {n}" for n in range(9)]}
    found = read_header(tmp_path / "m.gguf", map_file(tmp_path / "m.gguf"), longest_array=4)
    assert found.fields == wanted
    assert found.array_lengths == {"e": 3, "f": 9}
    [tensor] = found.tensors
    theirs = gguf.GGUFReader(tmp_path / "m.gguf").tensors[0]
    assert (tensor.name, tensor.shape) == ("t", (3, 5))
    assert found.data_start + tensor.offset_bytes == theirs.data_offset


@pytest.mark.parametrize("depth", range(1, MAX_ARRAY_DEPTH + 1))
def test_arrays_in_arrays_are_read(depth, file):
    value = 7
    for _ in range(depth):
        value = [value]
    for read in both(file(header([nested(depth)]))):
        found = read()
        assert (found if isinstance(found, dict) else found.fields) == {"k": value}


@pytest.mark.parametrize("depth", [MAX_ARRAY_DEPTH + 1, 500, 5000, 200_000])
def test_arrays_nested_too_deeply_are_refused(depth, file):
    refused(file(header([nested(depth)])), "metadata field k", "nested more than 4 deep")


def test_long_arrays_of_arrays_are_stepped_over_with_the_same_limit(file):
    inner = struct.pack("<IQB", UINT8, 1, 7)
    many = text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 9) + inner * 9
    path = file(header([many, text("after") + struct.pack("<II", UINT32, 5)]))
    found = read_header(path, map_file(path), longest_array=4)
    assert (found.fields, found.array_lengths) == ({"after": 5}, {"k": 9})
    deep = struct.pack("<IQ", ARRAY, 1) * 5000 + inner
    refused(
        file(header([text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 9) + deep * 9])), "nested more than 4 deep"
    )


@pytest.mark.parametrize("count", [2**31, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("kind", [UINT8, UINT32, STRING, ARRAY])
def test_a_count_beyond_the_file_is_refused_at_once(count, kind, file):
    refused(file(header([text("k") + struct.pack("<IIQ", ARRAY, kind, count) + b"\0" * 64])), "truncated")
    refused(file(header([nested(1)], num_fields=count)), "truncated")


@pytest.mark.parametrize("length", [2**31, 2**63, 2**64 - 1])
def test_a_string_beyond_the_file_is_refused(length, file):
    refused(file(header([struct.pack("<Q", length) + b"x"])), "truncated", "is it whole")


def test_a_string_that_is_not_utf8_is_refused_by_field(file):
    refused(
        file(header([text("general.name") + struct.pack("<I", STRING) + text(b"\xff\xfe")])),
        "general.name",
        "not UTF-8",
    )


def test_an_array_of_more_items_than_any_vocabulary_is_refused(file, monkeypatch):
    monkeypatch.setattr("flume_common.gguf.MAX_ARRAY_ITEMS", 10)
    path = file(header([text("k") + struct.pack("<IIQ", ARRAY, UINT8, 11) + b"\0" * 11]))
    refused(path, "metadata field k has 11 items; at most 10")


@pytest.mark.parametrize("alignment", [0, 2**32 - 1])
def test_an_alignment_that_makes_no_sense_is_refused(alignment, file):
    path = file(header([text("general.alignment") + struct.pack("<II", UINT32, alignment)]))
    if alignment:
        assert read_header(path, map_file(path), longest_array=4).data_start == alignment
        return
    with pytest.raises(GgufError, match=r"general\.alignment is 0"):
        read_header(path, map_file(path), longest_array=4)


@pytest.mark.parametrize("dims", [0, 5, 500, 2**32 - 1])
def test_a_tensor_of_other_dimensions_is_refused(dims, file):
    path = file(header([], tensors=text("t") + struct.pack("<I", dims) + b"\1" * 64, num_tensors=1))
    with pytest.raises(GgufError, match=rf"tensor t has {dims} dimensions; GGUF knows 1 to 4"):
        read_header(path, map_file(path), longest_array=4)
