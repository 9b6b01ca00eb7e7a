import argparse
from pathlib import Path

import pytest
from flume_common.etcd_flags import add_etcd_flags, etcd_arguments, store_config
from flume_common.store import StoreConfig

ENV = {
    "FLUME_ETCD": "env:1", "FLUME_ETCD_CA": "env-ca", "FLUME_ETCD_CERT": "env-cert",
    "FLUME_ETCD_KEY": "env-key", "FLUME_ETCD_USER": "env-user", "FLUME_ETCD_PASSWORD": "secret",
}  # fmt: skip


def parsed(words, env):
    parser = argparse.ArgumentParser()
    add_etcd_flags(parser.add_argument, env)
    return store_config(vars(parser.parse_args(words)), env)


def test_without_a_word_it_is_the_etcd_of_this_machine():
    assert parsed([], {}) == StoreConfig(("127.0.0.1:2379",))


def test_the_environment_says_what_the_command_line_does_not():
    config = parsed(["--etcd", "a:1,b:2", "--etcd-ca", "ca"], ENV)
    assert config == StoreConfig(
        ("a:1", "b:2"), Path("ca"), Path("env-cert"), Path("env-key"), user="env-user", password="secret"
    )
    assert parsed([], ENV).endpoints == ("env:1",)


def test_what_is_handed_on_says_the_same_and_no_password():
    config = parsed([], ENV)
    words = etcd_arguments(config)
    assert "secret" not in words
    assert parsed(words, {"FLUME_ETCD_PASSWORD": "secret"}) == config
    assert etcd_arguments(StoreConfig(("a:1",))) == ["--etcd", "a:1"]


@pytest.mark.parametrize(
    "words, env, said",
    [
        (["--etcd", "nonsense"], {}, "--etcd: etcd endpoint 'nonsense' is not host:port"),
        (["--etcd-cert", "c"], {}, "--etcd: an etcd client certificate needs both"),
        (["--etcd-user", "u"], {}, "--etcd-user u: its password is missing from FLUME_ETCD_PASSWORD"),
    ],
)
def test_what_can_not_be_is_refused_by_its_flag(words, env, said):
    with pytest.raises(ValueError, match=said):
        parsed(words, env)
