from flume_attention.blocks import BlockPool
from flume_attention.orphans import Orphans
from flume_attention.ranges import Range, Slot


def slot(pool, key, tokens=6):
    item = Range(pool, 4, start=0)
    item.reserve(tokens)
    item.commit(tokens)
    return Slot(key, [item] if tokens else [], tokens)


def test_only_who_claimed_takes_and_only_once():
    pool, orphans = BlockPool(8), Orphans(30)
    kept = slot(pool, 1)
    orphans.add("w1", b"", [kept], now_s=0)
    assert (orphans.held_tokens, orphans.held_blocks) == (6, 2)
    assert orphans.take(1, "w2") is None
    assert (
        orphans.claim(2, "w2", 0) is None and orphans.claim(1, "w3", 0) is orphans.claim(1, "w2", 0) is kept
    )
    assert orphans.take(1, "w3") is None, "the newest claim counts"
    assert orphans.take(1, "w2") is kept and orphans.take(1, "w2") is None
    assert pool.held == 2 and not orphans.held_tokens


def test_time_frees_what_nobody_took_and_a_claim_renews_it():
    pool, orphans = BlockPool(8), Orphans(30)
    orphans.add("w1", b"", [slot(pool, 1), slot(pool, 2)], now_s=0)
    orphans.claim(1, "w2", now_s=20)
    assert not orphans.expire(29.9) and orphans.expire(30) and pool.held == 2
    assert orphans.expire(50) and pool.held == len(orphans) == 0


def test_the_same_sequence_left_again_replaces_what_was_left_before():
    pool, orphans = BlockPool(8), Orphans(30)
    orphans.add("w1", b"", [slot(pool, 1)], now_s=0)
    orphans.add("w2", b"", [slot(pool, 1, tokens=9)], now_s=1)
    assert (len(orphans), orphans.held_tokens, pool.held) == (1, 9, 3)


def test_freeing_is_for_a_weight_node_or_one_engine_of_it():
    pool, orphans = BlockPool(16), Orphans(30)
    orphans.add("w1", b"old", [slot(pool, 1)], now_s=0)
    orphans.add("w1", b"new", [slot(pool, 2)], now_s=0)
    orphans.add("w2", b"", [slot(pool, 3)], now_s=0)
    assert orphans.free("w1", b"new") and not orphans.free("w1", b"new") and len(orphans) == 2
    assert orphans.free("w1") and len(orphans) == 1
    orphans.add("w1", b"", [slot(pool, 1), slot(pool, 2)], now_s=0)
    orphans.claim(1, "w2", now_s=0)
    assert orphans.free("w1") and len(orphans) == 2, "what another one has claimed is not its any more"
    orphans.clear()
    assert pool.held == 0


def test_nothing_is_kept_of_what_holds_nothing_or_without_a_grace_time():
    pool = BlockPool(8)
    for orphans, tokens in ((Orphans(30), 0), (Orphans(0), 5)):
        orphans.add("w1", b"", [slot(pool, 1, tokens)], now_s=0)
        assert len(orphans) == pool.held == 0


def test_a_slot_is_cut_at_a_position_and_closed():
    pool = BlockPool(8)
    kept = slot(pool, 1, tokens=6)
    tail = Range(pool, 4, start=10)
    tail.reserve(7)
    tail.commit(7)
    kept.add(tail)
    kept.held = 13
    kept.cut(13)
    assert [(r.start, r.length, r.closed) for r in kept.ranges] == [(0, 6, True), (10, 3, True)]
    assert (kept.held, pool.held) == (9, 3)
    kept.cut(4)
    assert [(r.start, r.length) for r in kept.ranges] == [(0, 4)] and pool.held == 1
