"""Kernels that find memory by address, against their definitions. Memory that no address names holds NaN."""

import threading

import pytest
import torch
from flume_common import direct_region
from flume_kernels.gpu import direct, direct_reference
from flume_kernels.gpu.flags import POISON

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
WAIT_S = 20.0


def randn(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def words(*values, device):
    return torch.tensor(values, dtype=torch.int64, device=device)


def rows_of(memory):
    """The address of each row."""
    return [memory[row].data_ptr() for row in range(len(memory))]


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def test_marks_are_those_of_a_direct_lane():
    assert direct.LAYER_BITS == direct_reference.LAYER_BITS == direct_region.LAYER_BITS


def test_flags_are_raised_to_the_mark_of_their_layer_but_those_of_no_address(device):
    flags = words(3, 4, 5, device=device)
    at = words(flags[0].data_ptr(), 0, flags[2].data_ptr(), device=device)
    direct.raise_flags(at, words(9, device=device), 2, words(0, device=device))
    synchronize()
    assert flags.tolist() == [direct_region.mark(9, 2), 4, direct_region.mark(9, 2)]


@pytest.mark.parametrize("status, signalled", [(0, 8), (1, POISON)], ids=["good", "failed"])
def test_the_host_hears_in_the_same_launch_that_flags_were_raised_or_that_the_step_has_failed(
    status, signalled, device
):
    flag, host, counter = words(3, device=device), words(0, device="cpu"), words(7, device=device)
    if device == "cuda":
        host = host.pin_memory()
    at = words(flag.data_ptr(), device=device)
    direct.raise_flags(at, words(9, device=device), 2, words(status, device=device), (host, counter))
    synchronize()
    assert flag.tolist() == [3 if status else direct_region.mark(9, 2)]
    assert (host.tolist(), counter.tolist()) == ([signalled], [8])


def test_a_step_that_has_failed_raises_nothing(device):
    flag = words(3, device=device)
    at = words(flag.data_ptr(), device=device)
    direct.raise_flags(at, words(9, device=device), 2, words(1, device=device))
    synchronize()
    assert flag.tolist() == [3]


class Waiting:
    """A wait for two flags and one of no address, in a thread; `raise_` is what the other device does."""

    def __init__(self, device, flags, step=7, layer=1, status=0):
        self.flags = words(*flags, device=device)
        self.at = words(self.flags[0].data_ptr(), 0, self.flags[1].data_ptr(), device=device)
        self.step, self.layer = words(step, device=device), layer
        self.abort, self.status = words(0, device="cpu"), words(status, device=device)
        self.abort = self.abort.pin_memory() if device == "cuda" else self.abort
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._wait, daemon=True)
        self.thread.start()

    def _wait(self):
        direct.await_flags(self.at, self.step, self.layer, self.abort, self.status)
        synchronize()
        self.done.set()

    def raise_(self, flag, value):
        other = torch.cuda.Stream() if self.flags.is_cuda else None
        with torch.cuda.stream(other):
            self.flags[flag].fill_(value)


MARK = direct_region.mark(7, 1)


def test_a_wait_ends_when_every_flag_has_the_mark_and_not_before(device):
    waiting = Waiting(device, [MARK - 1, direct_region.mark(6, 11)])
    waiting.raise_(0, MARK)
    assert not waiting.done.wait(0.2)
    waiting.raise_(1, MARK)
    assert waiting.done.wait(WAIT_S) and waiting.status.tolist() == [0]


def test_flags_that_are_ahead_are_not_waited_for(device):
    waiting = Waiting(device, [MARK, direct_region.mark(7, 3)])
    assert waiting.done.wait(WAIT_S)
    assert waiting.flags.tolist() == [MARK, direct_region.mark(7, 3)], "a wait changes nothing"


def test_poison_ends_a_wait_and_says_so(device):
    waiting = Waiting(device, [MARK, 0])
    assert not waiting.done.wait(0.1)
    waiting.abort.fill_(POISON)
    assert waiting.done.wait(WAIT_S) and waiting.status.tolist() == [1]


def test_an_abort_word_that_is_no_poison_is_none(device):
    waiting = Waiting(device, [MARK, 0])
    waiting.abort.fill_(POISON - 1)
    assert not waiting.done.wait(0.2)
    waiting.raise_(1, MARK)
    assert waiting.done.wait(WAIT_S) and waiting.status.tolist() == [0]


def test_nothing_is_waited_for_once_the_step_has_failed(device):
    assert Waiting(device, [0, 0], status=1).done.wait(WAIT_S)


def test_many_flags_are_awaited_together(device):
    flags = torch.full((300, 16), MARK, dtype=torch.int64, device=device)
    at, status = words(*rows_of(flags), device=device), words(0, device=device)
    direct.await_flags(at, words(7, device=device), 1, words(0, device="cpu"), status)
    direct.raise_flags(at, words(8, device=device), 0, status)
    synchronize()
    assert (flags[:, 0] == direct_region.mark(8, 0)).all() and (flags[:, 1:] == MARK).all()


@DTYPES
@pytest.mark.parametrize("kv_heads, dim", [(2, 64), (1, 80), (6, 96)])
def test_partials_are_merged_from_wherever_they_lie(kv_heads, dim, dtype, device):
    q, kv = randn(3, 6, dim, dtype=dtype, device=device), randn(3, 2 * kv_heads, dim, device=device, seed=1)
    k, v = kv.to(dtype).chunk(2, 1)
    o = torch.full((6, 6, dim), torch.nan, dtype=dtype, device=device)
    lse = torch.full((6, 6), torch.nan, device=device)
    asked = torch.tensor([0, 2, 5])
    o[asked], lse[asked] = randn(3, 6, dim, dtype=dtype, device=device, seed=2), randn(3, 6, device=device)
    o[5], lse[5, :3] = torch.nan, -torch.inf  # no keys, for some heads
    lse[5, 3:] = -torch.inf
    o_at, lse_at = rows_of(o), rows_of(lse)
    tables = [[[at[2], at[5], 0], [at[0], 0, 0]] for at in (o_at, lse_at)]
    tables = [words(*table, device=device) for table in tables]
    out = torch.full((3, 6, dim), torch.nan, dtype=dtype, device=device)
    direct.direct_merge(q, k, v, *tables, out, dim**-0.5)
    synchronize()
    want = merged_on_host(q, k, v, tables, dim**-0.5, o, lse)
    torch.testing.assert_close(out.double().cpu(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def merged_on_host(q, k, v, tables, scale, o, lse):
    """The definition reads host memory: the same partials, moved there."""
    here = o.cpu(), lse.cpu()
    at = [
        torch.where(table == 0, table, table - there.data_ptr() + copy.data_ptr()).cpu()
        for table, there, copy in zip(tables, (o, lse), here, strict=True)
    ]
    return direct_reference.direct_merge(q.cpu(), k.cpu(), v.cpu(), *at, scale)


def test_arguments_that_do_not_fit_are_refused(device):
    x, word = torch.zeros(2, 4, 64, device=device), words(0, device=device)
    table = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="table"):
        direct.direct_merge(x, x, x, table[:, :1], table, x, 1.0)
    with pytest.raises(ValueError, match="contiguous"):
        direct.direct_merge(x, x, x, table, table, x.mT.contiguous().mT, 1.0)
    with pytest.raises(ValueError, match="int64"):
        direct.raise_flags(table[0], word.int(), 0, word)
    with pytest.raises(ValueError, match="flags_at"):
        direct.await_flags(table, word, 0, word, word)
    with pytest.raises(ValueError, match="parts"):
        direct.direct_merge(x, x, x, table, table[:0], x, 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        direct.direct_merge(x, x[:, :3], x[:, :3], table, table, x, 1.0)


class TestDefinitions:
    """What simulated devices run in the kernels' place; here, as the kernels' tests above would have it."""

    def test_rows_and_flags_go_where_the_table_says(self):
        q, there = randn(2, 3, 4), torch.full((3, 3, 4), torch.nan)
        direct_reference.push(q, words([0, there[2].data_ptr()], [there[0].data_ptr(), 0], device="cpu"))
        assert torch.equal(there[[0, 2]], q) and there[1].isnan().all()
        flags = words(1, 1, device="cpu")
        at = words(0, flags[1].data_ptr(), device="cpu")
        direct_reference.raise_flags(at, words(2, device="cpu"), 3, words(0, device="cpu"))
        assert flags.tolist() == [1, direct_region.mark(2, 3)]
        assert direct_reference.behind(at, words(2, device="cpu"), 3) == []
        assert direct_reference.behind(at, words(2, device="cpu"), 4) == [1]
