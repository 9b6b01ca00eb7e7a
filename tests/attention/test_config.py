import pytest
from flume_attention.config import engine_args, flags, parse
from flume_attention.errors import ConfigRefused


def test_the_engine_gets_what_the_command_line_says():
    config = parse(["--dtype", "bfloat16", "--threads", "2", "--prefill-threads", "3", "--spin-us", "7"])
    args = engine_args(config, 4096)
    wanted = {"--kv-bytes": "4096", "--dtype": "bfloat16", "--threads": "2"}
    wanted |= {"--prefill-threads": "3", "--spin-us": "7.0", "--device": "cpu"}
    wanted |= {"--orphan-grace-s": "30.0", "--pull-tokens-per-step": "64", "--hop": "auto"}
    wanted |= {"--lanes-host": "127.0.0.1"}
    assert dict(zip(args[::2], args[1::2], strict=True)) == wanted


def test_any_dtype_is_taken_unless_one_is_named():
    config = parse([])
    assert config.dtype is None and "--dtype" not in engine_args(config, 1)


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--threads", "0"),
        ("--prefill-threads", "-1"),
        ("--spin-us", "-1"),
        ("--lease-ttl-s", "1"),
        ("--orphan-grace-s", "-1"),
        ("--pull-tokens-per-step", "0"),
    ],
)
def test_values_out_of_range_are_refused_by_the_flags_name(flag, value):
    with pytest.raises(ConfigRefused, match=flag):
        parse([flag, value])


def test_help_shows_examples():
    assert "--kv-memory 8GiB" in flags().format_help()
