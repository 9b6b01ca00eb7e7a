from flume_common.wire import Credit
from flume_weight.credit import CreditLedger
from hypothesis import given
from hypothesis import strategies as st


def credit(granted, *, free=0, draining=False):
    return Credit(granted, 100, free, draining, committed_step=0)


def test_unused_credit_is_what_was_granted_and_neither_taken_nor_returned():
    ledger = CreditLedger(100)
    ledger.hear(credit(10))
    ledger.take(4)
    assert ledger.unused_blocks == 6
    assert ledger.give_back_beyond(1) == 5
    assert ledger.unused_blocks == 1


def test_an_old_message_takes_no_credit_away():
    ledger = CreditLedger(100)
    ledger.hear(credit(10))
    ledger.hear(credit(7))
    assert ledger.unused_blocks == 10


def test_a_draining_node_has_only_the_credit_in_hand():
    ledger = CreditLedger(100)
    ledger.hear(credit(3, free=50, draining=True))
    assert ledger.reachable_blocks == 3 and not ledger.exhausted
    ledger.take(3)
    assert ledger.exhausted


@given(
    st.lists(
        st.one_of(st.integers(0, 9).map(lambda n: ("grant", n)), st.just(("take", 1)), st.just(("back", 2)))
    )
)
def test_credit_is_never_spent_twice(events):
    """Whatever the order, taken plus returned never exceeds granted when we take only what is unused."""
    ledger = CreditLedger(1000)
    granted = 0
    for what, count in events:
        if what == "grant":
            granted += count
            ledger.hear(credit(granted))
        elif what == "take" and ledger.unused_blocks >= count:
            ledger.take(count)
        elif what == "back":
            ledger.give_back_beyond(count)
        assert 0 <= ledger.taken_blocks + ledger.returned_blocks <= granted
