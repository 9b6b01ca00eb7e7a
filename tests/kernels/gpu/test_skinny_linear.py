"""skinny_linear against its definition.

Tolerances, of the largest value of the result: fp32 1e-5, fp16 2e-3, bf16 1e-2. Inputs of 16 bits are exact
and sums are float32, so that is one rounding of the result; of a norm, also that of x ∘ w, whose errors are
independent and grow in a sum of K products as √K where the sum itself does. Memory beside inputs and outputs
holds NaN and must neither be felt nor be written.
"""

from dataclasses import replace

import pytest
import torch
from flume_kernels.gpu import reference
from flume_kernels.gpu.skinny_linear import SkinnyConfig, SplitMemory, skinny_linear, tile_rows

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
SMALL = SkinnyConfig(block_n=16, block_k=32, num_stages=2)
SLICED = SkinnyConfig(block_n=16, block_k=64, num_stages=2, slices=4)
SPLITS = pytest.mark.parametrize("split", [1, 3], ids=["whole", "in 3 parts"])
EPS = 1e-5


def randn(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def framed(tensor):
    """The same values with NaN after each row and after the last: a view, and the NaN."""
    rows, size = tensor.shape
    frame = torch.full((rows + 1, size + 8), torch.nan, dtype=tensor.dtype, device=tensor.device)
    frame[:rows, :size] = tensor
    return frame[:rows, :size], (frame[rows], frame[:rows, size:])


def vector(tensor):
    return framed(tensor[None])[0][0]


class Problem:
    """Tensors of a problem, each with NaN beside it. `out` holds NaN, or a residual to be added to."""

    def __init__(self, rows, outputs, inner, dtype, device, gated=False, bias=False, norm=False, add=False):
        products = 2 * outputs if gated else outputs
        options = {"dtype": dtype, "device": device}
        self.x, _ = framed(randn(rows, inner, **options))
        self.weight, _ = framed(randn(products, inner, seed=1, **options))
        self.bias = vector(randn(products, seed=2, **options) * 5) if bias else None
        self.norm = vector(1 + randn(inner, seed=3, **options) / 2) if norm else None
        self.gated, self.add = gated, add
        residual = randn(rows, outputs, seed=4, **options) * 9
        self.residual = residual if add else torch.zeros_like(residual)
        self.out, self.beside = framed(residual if add else torch.full_like(residual, torch.nan))

    def run(self, config, memory=None):
        skinny_linear(
            self.x, self.weight, self.out, config, memory or SplitMemory(),
            bias=self.bias, norm=self.norm, eps=EPS, gated=self.gated, add=self.add,
        )  # fmt: skip

    def check(self):
        want = reference.skinny_linear(self.x, self.weight, self.bias, self.norm, EPS, self.gated)
        want = want + self.residual.double()
        tolerance = TOLERANCE[self.out.dtype] * want.abs().max().item()
        torch.testing.assert_close(self.out.double(), want, atol=tolerance, rtol=0)
        assert all(margin.isnan().all() for margin in self.beside)


@DTYPES
@SPLITS
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"norm": True, "bias": True}, {"gated": True, "norm": True}, {"add": True}],
    ids=lambda options: " ".join(options) or "plain",
)
def test_a_product_is_its_definition(options, split, dtype, device):
    problem = Problem(5, 37, 200, dtype, device, **options)
    problem.run(SkinnyConfig(16, 32, split, 3))
    problem.check()


@pytest.mark.parametrize(
    "options",
    [{"norm": True, "add": True, "bias": True}, {"gated": True, "norm": True, "bias": True}],
    ids=" ".join,
)
def test_all_of_it_together(options, device):
    problem = Problem(3, 50, 96, torch.float32, device, **options)
    problem.run(SkinnyConfig(32, 32, 2, 2))
    problem.check()


@DTYPES
@SPLITS
@pytest.mark.parametrize(
    "options",
    [{"norm": True, "bias": True}, {"gated": True, "norm": True}, {"add": True}],
    ids=lambda options: " ".join(options) or "plain",
)
def test_warps_that_take_slices_compute_the_same(options, split, dtype, device):
    problem = Problem(5, 37, 200, dtype, device, **options)
    problem.run(replace(SLICED, split=split))
    problem.check()


@pytest.mark.parametrize("rows", [1, 8, 9, 33, 64])
def test_any_number_of_rows_up_to_64(rows, device):
    problem = Problem(rows, 20, 64, torch.float32, device, norm=True)
    problem.run(SMALL)
    problem.check()


@SPLITS
@pytest.mark.parametrize("outputs, inner", [(1, 1), (16, 32), (17, 33), (31, 31), (128, 65)])
def test_odd_sizes(outputs, inner, split, device):
    problem = Problem(2, outputs, inner, torch.float32, device, norm=True)
    problem.run(SkinnyConfig(16, 32, split, 2))
    problem.check()


def test_more_parts_than_blocks_of_k(device):
    problem = Problem(2, 16, 40, torch.float32, device, gated=True, norm=True)
    problem.run(SkinnyConfig(16, 32, 5, 2))
    problem.check()


def test_no_rows_are_no_work(device):
    problem = Problem(0, 16, 32, torch.float32, device)
    problem.run(SMALL)


def test_a_sum_is_rounded_once(device):
    # Near 2048 the step is 2: the product lies just above half of it, and rounded by itself would be half.
    x = torch.ones(1, 2, device=device, dtype=torch.float16)
    weight = torch.tensor([[1.0, 2**-11]], device=device, dtype=torch.float16)
    out = torch.full((1, 1), 2048.0, device=device, dtype=torch.float16)
    skinny_linear(x, weight, out, SMALL, SplitMemory(), add=True)
    assert out.item() == 2050.0


def test_a_gate_far_below_zero_is_shut_and_not_nan(device):
    problem = Problem(1, 16, 32, torch.float32, device, gated=True)
    problem.x.fill_(1.0)
    problem.weight[:16] = -1000.0
    problem.run(SMALL)
    assert not problem.out.any()


def test_the_norm_of_small_numbers_feels_eps_and_zeros_stay_zero(device):
    problem = Problem(2, 16, 32, torch.float32, device, norm=True)
    problem.x[0] *= 1e-3
    problem.x[1] = 0
    problem.run(SkinnyConfig(16, 16, 2, 2))
    problem.check()
    assert not problem.out[1].any()


def test_parts_repeat_bit_for_bit_in_memory_used_before(device):
    memory, results = SplitMemory(), []
    Problem(4, 64, 96, torch.float32, device, gated=True, norm=True).run(SkinnyConfig(16, 32, 3, 2), memory)
    memory._held[0][0].fill_(torch.nan)  # what others left there
    for _ in range(3):
        problem = Problem(4, 40, 96, torch.float32, device, norm=True)
        problem.run(SkinnyConfig(16, 32, 3, 2), memory)
        problem.check()
        results.append(problem.out)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not memory._held[0][1].any()


def test_memory_grows_and_keeps_what_launches_were_captured_with():
    memory = SplitMemory()
    small, large = memory.of(10, 3, torch.device("cpu")), memory.of(100, 3, torch.device("cpu"))
    assert len(small[0]) >= 10 and len(large[0]) >= 100 and small[0] is not large[0]
    assert memory.of(90, 4, torch.device("cpu"))[0] is large[0]
    assert memory.of(10, 3, torch.device("cpu"))[0] is small[0]
    assert memory.of(10, 90, torch.device("cpu"))[1].tolist() == [0] * 128


def test_tiles_are_as_few_rows_as_a_tensor_core_takes():
    assert [tile_rows(rows) for rows in (1, 8, 9, 17, 64)] == [8, 8, 16, 32, 64]
    with pytest.raises(ValueError, match="65 rows"):
        tile_rows(65)


def test_arguments_that_do_not_fit_are_refused():
    x, weight, out = torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(2, 4)
    refused = {
        "weight:": (x, weight[:, :7].contiguous(), out, {}),
        "dtype": (x, weight.half(), out, {}),
        "out:": (x, weight, out[:, :3], {}),
        "strides": (x, weight, torch.zeros(4, 2).T, {}),
        "bias": (x, weight, out, {"bias": torch.zeros(3)}),
        "norm": (x, weight, out, {"norm": torch.zeros(4)}),
        "halves": (x, weight, out[:, :2], {"gated": True, "add": True}),
    }
    for message, (a, b, c, options) in refused.items():
        with pytest.raises(ValueError, match=message):
            skinny_linear(a, b, c, SMALL, SplitMemory(), **options)
