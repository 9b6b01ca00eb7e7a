"""Parts of a GGUF model are found by their names."""

import pytest
from flume_common.gguf_parts import MissingParts, part_paths, whole_name
from flume_common.model_source import ModelSourceError, resolve_model
from flume_controller.gpu_budget import GGUF_GROWTH, model_bytes

NAMES = [f"Qwen2.5-7B.Q4_K_M-{n:05}-of-00003.gguf" for n in (1, 2, 3)]


@pytest.fixture
def parts(tmp_path):
    for name in NAMES:
        (tmp_path / name).write_bytes(b"GGUF" + b"\0" * 96)
    return [tmp_path / name for name in NAMES]


@pytest.mark.parametrize("given", range(3))
def test_any_part_is_the_whole_model(given, parts):
    assert list(part_paths(parts[given])) == parts
    source = resolve_model(str(parts[given]))
    assert (source.path, source.kind, source.name) == (parts[0], "gguf", "Qwen2.5-7B.Q4_K_M")
    assert model_bytes(source, "bfloat16") == 300 * GGUF_GROWTH


@pytest.mark.parametrize("lost", range(3))
def test_a_part_that_is_not_there_is_named(lost, parts):
    parts[lost].unlink()
    given = parts[lost - 1]
    with pytest.raises(MissingParts) as caught:
        part_paths(given)
    assert caught.value.missing == [parts[lost]]
    with pytest.raises(ModelSourceError, match=rf"one part of a model; missing in .*: {parts[lost].name}"):
        resolve_model(str(given))


@pytest.mark.parametrize(
    "name, whole",
    [
        ("m.gguf", "m"),
        ("m-1-of-2.gguf", "m-1-of-2"),
        ("m-00001-of-00001.gguf", "m"),
        ("m-00002-of-00003.gguf.gguf", "m-00002-of-00003.gguf"),
    ],
)
def test_another_name_is_a_file_of_its_own(name, whole, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"GGUF")
    assert part_paths(path) == (path,)
    assert whole_name(path) == whole


@pytest.mark.parametrize("name", ["m-00004-of-00003.gguf", "m-00000-of-00003.gguf", "m-00001-of-00000.gguf"])
def test_a_number_outside_its_count_is_no_part(name, tmp_path):
    assert part_paths(tmp_path / name) == (tmp_path / name,)
