import pytest
from flume_common.keys import Keys


def test_keys_lie_where_the_design_says():
    keys = Keys("prod")
    assert keys.members == "/flume/v1/prod/members/"
    assert keys.member("weight", "w-1") == "/flume/v1/prod/members/weight/w-1"
    assert keys.route("cmpl-7") == "/flume/v1/prod/routes/cmpl-7"
    assert keys.spec_attention == "/flume/v1/prod/spec/attention"
    assert keys.status_attention == "/flume/v1/prod/status/attention"
    assert keys.election == "/flume/v1/prod/election/controller/"


def test_every_prefix_ends_in_a_slash_so_that_no_neighbour_matches():
    keys = Keys("c")
    for prefix in (keys.root, keys.members, keys.routes, keys.config, keys.election, keys.events):
        assert prefix.endswith("/")


@pytest.mark.parametrize("name", ["", "a/b", "-a", "a-", "a b", "ü", "a" * 129, "a\n"])
def test_a_name_that_would_break_the_tree_is_refused_and_named(name):
    with pytest.raises(ValueError, match="cluster"):
        Keys(name)
    with pytest.raises(ValueError, match="node"):
        Keys("c").member("weight", name)


def test_any_text_may_name_a_sequence_without_leaving_its_segment():
    keys = Keys("c")
    odd = keys.route("../members/weight/w 1")
    assert odd.startswith(keys.routes)
    assert "/" not in odd.removeprefix(keys.routes)
    assert odd != keys.route("..%2Fmembers%2Fweight%2Fw%201")
