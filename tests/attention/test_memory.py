import pytest
from flume_attention.errors import ConfigRefused
from flume_attention.memory import Memory, kv_bytes, measure, measure_gpu
from flume_common.gpu.nvml import Driver, Gpu, NvmlUnavailable

GIB = 1 << 30
MACHINE = Memory(total_bytes=8 * GIB, free_bytes=4 * GIB)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("512MiB", GIB // 2),
        ("512Mi", GIB // 2),
        ("2GiB", 2 * GIB),
        ("1.5 GiB", 3 * GIB // 2),
        ("3GB", 3_000_000_000),
        ("1048576", 1 << 20),
        ("25%", GIB),
        ("12.5 %", GIB // 2),
    ],
)
def test_a_size_or_a_share_of_what_is_free(text, expected):
    assert kv_bytes(text, MACHINE) == expected


@pytest.mark.parametrize(
    "text, said",
    [
        ("lots", "give a size"),
        ("5 pounds", "give a size"),
        ("-1GiB", "give a size"),
        ("0", "no memory"),
        ("0%", "above 0%"),
        ("101%", "at most 100%"),
        ("9GiB", str(8 * GIB)),
    ],
)
def test_what_cannot_be_is_refused_with_what_could(text, said):
    with pytest.raises(ConfigRefused, match="--kv-memory") as error:
        kv_bytes(text, MACHINE)
    assert said in str(error.value)


def test_a_containers_limit_counts(tmp_path):
    (tmp_path / "memory.max").write_text(f"{100 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{60 << 20}\n")
    assert measure(tmp_path) == Memory(100 << 20, 40 << 20)


@pytest.mark.parametrize("limit", ["max", str(1 << 62), None])
def test_without_a_limit_the_machines_memory_counts(tmp_path, limit):
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
    memory = measure(tmp_path)
    assert memory.total_bytes > memory.free_bytes > 0
    assert memory.total_bytes == measure(tmp_path / "nowhere").total_bytes


CARDS = Driver(
    "570",
    "12.8",
    (
        Gpu(0, "H200", "GPU-aa", 140 * GIB, 20 * GIB, "9.0", False),
        Gpu(1, "A100", "GPU-bb", 80 * GIB, 0, "8.0", None),
    ),
)


@pytest.mark.parametrize(
    "visible, free_gib", [(None, 120), ("0,1", 120), ("1", 80), ("GPU-bb", 80), ("GPU-aa,1", 120)]
)
def test_a_gpus_memory_is_that_of_the_first_card_this_process_sees(monkeypatch, visible, free_gib):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert measure_gpu(lambda: CARDS).free_bytes == free_gib * GIB


def test_without_a_gpu_that_can_be_used_it_says_why_and_what_to_do(monkeypatch):
    def no_driver():
        raise NvmlUnavailable("no NVIDIA driver")

    with pytest.raises(ConfigRefused, match=r"no GPU can be used: no NVIDIA driver; use --device cpu"):
        measure_gpu(no_driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigRefused, match="the driver shows none under CUDA_VISIBLE_DEVICES=''"):
        measure_gpu(lambda: CARDS)
