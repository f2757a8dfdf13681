"""The score family in the interpreter: against the CPU engine, float64 truth, and its own other batches and tiles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import cacovid_kernels as ck
from cacovid_kernels.reference import score as reference
from cacovid_kernels.triton import frame_pool as pool_module
from cacovid_kernels.triton import score

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "transposed", "sliced", "spread", "backward"]
GRIDS = [
    [1, 1, 1],
    [2, 3, 3],
    [3, 5, 13],
    [2, 10, 13],
    [4, 1, 4, 1, 5, 1],
    [2, 8, 8, 1, 16, 4, 1, 9, 9],
    [1, 17, 17, 2, 3, 27],
]


def tokens_of(grid):
    return sum(grid[i] * grid[i + 1] * grid[i + 2] for i in range(0, len(grid), 3))


def laid_out(x, layout):
    """The values of x in another memory layout, NaN between them."""
    if layout == "contiguous":
        return x
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "sliced":
        wide = torch.full((x.shape[0] * 2, x.shape[1] + 5), torch.nan, dtype=x.dtype)
        wide[::2, 3:-2] = x
        return wide[::2, 3:-2]
    if layout == "spread":
        wide = torch.full((x.shape[0], x.shape[1], 3), torch.nan, dtype=x.dtype)
        wide[..., 1] = x
        return wide[..., 1]
    wide = torch.full((x.shape[0] + 1, x.shape[1]), torch.nan, dtype=x.dtype)  # one row too many, off by one element
    wide.view(-1)[1 : 1 + x.numel()] = x.reshape(-1)
    return wide.view(-1)[1 : 1 + x.numel()].view(x.shape)


def make_head(size, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    head = ck.PolicyHead(size)
    for p in head.parameters():
        # Gains near one, so that scores spread as those of a trained policy do.
        torch.nn.init.normal_(p, std=1.5 / p.shape[-1] ** 0.5 if p.dim() == 2 else 0.1)
    return head.to(dtype).requires_grad_(False)


def arguments(size, dtype=torch.float32, seed=0):
    weights, biases, vector, offset = make_head(size, dtype, seed).folded()
    return list(weights), list(biases), vector, offset


def truth(rows, rrms, weights, biases, vector, offset):
    """The scores in float64."""
    x = rows.double()
    scale = 1 if rrms is None else rrms.double()[:, None]
    for w, b in zip(weights, biases, strict=True):
        x, scale = F.silu(F.linear(x, w.double()) * scale + b.double()), 1
    return x @ vector.double() + offset.double()


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched."""
    names = []
    for module in (pool_module, score):
        launch = module.launch

        def counted(kernel, grid, *args, launch=launch, **options):
            names.append(kernel.fn.__name__)
            launch(kernel, grid, *args, **options)

        monkeypatch.setattr(module, "launch", counted)
    return names


# ---- row norms and frame means ------------------------------------------------------------------


def check_pool(x, grid, eps=1e-6):
    rrms, means = score.frame_pool(x, grid, eps)
    expected_rrms, expected_means = reference.frame_pool(x, grid, eps)
    torch.testing.assert_close(rrms, expected_rrms, rtol=2e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(means, expected_means, rtol=1e-6, atol=2e-6, equal_nan=True)
    return rrms, means


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("columns", [1, 16, 100, 600])
def test_frame_pool_equals_reference(dtype, grid, columns):
    torch.manual_seed(columns)
    check_pool((torch.randn(tokens_of(grid), columns) * 3).to(dtype), grid)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frame_pool_has_the_same_bits_in_every_layout(layout):
    grid = [2, 3, 3, 1, 10, 7]
    x = torch.randn(tokens_of(grid), 40).half()
    for mine, straight in zip(score.frame_pool(laid_out(x, layout), grid, 1e-6), check_pool(x, grid), strict=True):
        assert torch.equal(mine, straight)


@pytest.mark.parametrize("frame", [(3, 4), (9, 10)])
def test_frame_pool_of_a_frame_ignores_its_batch(frame):
    h, w = frame
    x = torch.randn(5 * h * w + 6, 40)
    rrms, means = score.frame_pool(x, [2, h, w, 1, 2, 3, 3, h, w], 1e-6)
    for f, start in [(0, 0), (1, h * w), (3, 2 * h * w + 6), (5, 4 * h * w + 6)]:
        alone = score.frame_pool(x[start : start + h * w], [1, w, h], 1e-6)
        assert torch.equal(alone[0], rrms[start : start + h * w])
        assert torch.equal(alone[1][0], means[f])


@pytest.mark.parametrize("dtype", DTYPES)
def test_frame_pool_converts_every_kind_of_value(dtype):
    odd = [0.0, -0.0, 1e-40, 3e-39, 6e-8, 1.5, -2.5e30, torch.inf, -torch.inf, torch.nan, 65504.0, 1e-5]
    x = torch.tensor(odd).to(dtype)
    check_pool(x[:, None], [len(odd), 1, 1])
    check_pool(x[None, :7].repeat(3, 2), [1, 3, 1])
    check_pool(torch.zeros(4, 8, dtype=dtype), [2, 2, 1], eps=1e-3)


def test_videos_of_one_size_share_their_launches(launches):
    for grid, expected in [
        ([32, 8, 8], ["pool_kernel"]),
        ([1, 14, 14], ["pool_kernel", "add_kernel"]),
        ([2, 2, 3, 1, 3, 2, 4, 6, 1], ["pool_kernel"]),
        ([1, 2, 2, 1, 8, 9, 1, 2, 2], ["pool_kernel", "pool_kernel", "add_kernel", "pool_kernel"]),
        ([], []),
    ]:
        launches.clear()
        rrms, means = score.frame_pool(torch.randn(tokens_of(grid), 16), grid, 1e-6)
        assert launches == expected
        assert rrms.shape == (tokens_of(grid),)
        assert means.shape == (sum(grid[::3]), 16)


# ---- the head -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 24, 64, 70, 256])
@pytest.mark.parametrize("rows", [0, 1, 5, 65])
def test_head_equals_reference(size, rows):
    head = arguments(size)
    x, rrms = torch.randn(rows, size), torch.rand(rows) + 0.5
    for scale in (None, rrms):
        mine = score.head_scores(x, scale, *head)
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, reference.head_scores(x, scale, *head), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [score.WIDE, *score.TILES, *score.FLOAT32_TILES, score.PLAIN], ids=str)
@pytest.mark.parametrize("size", [320, 70])
def test_every_tile_gives_the_same_scores(tile, size, monkeypatch):
    """Sums over 320 and 160 end on a step of some tiles and within one of others; 160 units overhang most."""
    head, x, rrms = arguments(size), torch.randn(130, size), torch.rand(130) + 0.5
    monkeypatch.setattr(score, "_tile", lambda *args: tile)
    torch.testing.assert_close(
        score.head_scores(x, rrms, *head), reference.head_scores(x, rrms, *head), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("rows", "units", "inputs", "halves", "arch", "expected"),
    [
        (6272, 1792, 3584, True, 90, score.WIDE),
        (6272, 1792, 3584, True, 100, score.WIDE),
        (6272, 1792, 3584, True, 80, score.TILES[0]),
        (6272, 1792, 3584, True, 120, score.TILES[0]),
        (512, 1792, 3584, True, 90, score.TILES[1]),
        (32, 1792, 3584, True, 90, score.TILES[2]),
        (6272, 1792, 3584, False, 90, score.FLOAT32_TILES[0]),
        (32, 1792, 3584, False, 90, score.FLOAT32_TILES[1]),
        (6272, 1793, 3586, True, 90, score.PLAIN),
    ],
)
def test_tiles_fit_the_shape(rows, units, inputs, halves, arch, expected):
    assert score._tile(rows, units, inputs, halves, arch, 132) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [64, 70])
def test_head_takes_every_layout(layout, size):
    weights, *rest = arguments(size)
    x, rrms = torch.randn(9, size), torch.rand(9) + 0.5
    expected = score.head_scores(x, rrms, weights, *rest)
    assert torch.equal(
        score.head_scores(laid_out(x, layout), laid_out(rrms[:, None], layout)[:, 0], weights, *rest), expected
    )
    weights = [laid_out(w, layout) for w in weights]
    assert torch.equal(score.head_scores(x, rrms, weights, *rest), expected)
    (biases, vector, offset) = rest
    spread = [torch.stack([b, b * torch.nan], 1)[:, 0] for b in (*biases, vector)]
    assert torch.equal(score.head_scores(x, rrms, weights, spread[:-1], spread[-1], offset), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_last_layers_of_many_units(dtype):
    widths = [16, 16, 16, 16, 300]
    weights = [torch.randn(n, k).to(dtype) / 4 for k, n in zip(widths, widths[1:], strict=False)]
    rest = [torch.randn(n).to(dtype) for n in widths[1:]], torch.randn(300), torch.randn(())
    x = torch.randn(40, 16).to(dtype)
    mine, exact = score.head_scores(x, None, weights, *rest), truth(x, None, weights, *rest)
    torch.testing.assert_close(mine.double(), exact, rtol=0, atol=1e-4 if dtype is torch.float32 else 0.3)


@pytest.mark.parametrize("tile", [None, score.WIDE])
def test_error_is_at_most_twice_that_of_torch(tile, monkeypatch):
    """float16 alone: the interpreter cuts off what a bfloat16 has no bits for."""
    if tile:
        monkeypatch.setattr(score, "_tile", lambda *args: tile)
    head = arguments(512, torch.float16)
    for scale in (1, 300):
        x = (torch.randn(40, 512) * scale).half()
        rrms = torch.rsqrt(x.float().square().mean(1) + 1e-6)
        exact = truth(x, rrms, *head)
        mine = score.head_scores(x, rrms, *head) - exact
        theirs = reference.head_scores(x, rrms, *head) - exact
        assert mine.abs().max() <= 2 * theirs.abs().max()
        assert mine.square().mean() <= 4 * theirs.square().mean()


def test_products_of_float16_may_pass_its_range():
    x = torch.full((2, 64), 60000.0, dtype=torch.float16)
    weights, biases, vector, offset = arguments(64, torch.float16)
    weights[0] = weights[0].abs() + 0.5
    rrms = torch.full((2,), 1 / 60000.0)
    mine = score.head_scores(x, rrms, weights, biases, vector, offset)
    torch.testing.assert_close(mine.double(), truth(x, rrms, weights, biases, vector, offset), rtol=1e-2, atol=1e-2)


def test_a_row_of_nan_or_infinity_spoils_no_other():
    head, x, rrms = arguments(64), torch.randn(9, 64), torch.rand(9) + 0.5
    expected = score.head_scores(x, rrms, *head)
    x[3], x[5, 7] = torch.nan, torch.inf
    mine = score.head_scores(x, rrms, *head)
    good = torch.tensor([i not in (3, 5) for i in range(9)])
    assert torch.equal(mine[good], expected[good])
    assert mine[3].isnan()
    assert not mine[5].isfinite()


def test_a_head_is_four_launches(launches):
    score.head_scores(torch.randn(40, 32), None, *arguments(32))
    assert launches == ["layer_kernel"] * 3 + ["last_kernel"]


# ---- the public functions -----------------------------------------------------------------------


class NoReads(TorchDispatchMode):
    """Fails on every operator that would make the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert not name.startswith(("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")), name
        assert not name.startswith(("aten::index", "aten::masked_select")), name
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_on_the_host(monkeypatch):
    for module in (pool_module, score):
        monkeypatch.setattr(module, "launch", lambda *args, **options: None)
    x, head = torch.randn(70, 32), arguments(32)
    with NoReads():
        rrms, _ = score.frame_pool(x, [1, 7, 10], 1e-6)
        score.head_scores(x.t().contiguous().t(), rrms, *head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_score_tokens_agrees_with_the_cpu_engine(dtype):
    grid = [(2, 4, 4), (1, 9, 8)]
    token_head, frame_head, weight = make_head(64, dtype), make_head(64, dtype, 1), (torch.rand(64) + 0.5).to(dtype)
    hidden = torch.randn(104, 64).to(dtype)
    mine = ck.score_tokens(hidden, token_head, frame_head, grid, norm_weight=weight)
    alone, none = ck.score_tokens(hidden, token_head, norm_weight=weight)
    with ck.use_backend("cpu"):
        theirs = ck.score_tokens(hidden, token_head, frame_head, grid, norm_weight=weight)
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    for a, b in zip((*mine, alone), (*theirs, theirs[0]), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert none is None


def test_autocast_computes_in_its_type(monkeypatch):
    head, weight, hidden = make_head(32), torch.ones(32), torch.randn(6, 32)
    seen = []
    monkeypatch.setattr(score, "launch", lambda kernel, grid, rows, *args, **options: seen.append(rows.dtype))
    with torch.autocast("cpu", torch.float16):
        ck.score_tokens(hidden, head, norm_weight=weight)
    assert seen == [torch.float16] * 4


def test_policy_agrees_with_the_cpu_engine():
    torch.manual_seed(0)
    policy = ck.CompressionPolicy(ck.PolicyConfig(32, 64, 4, 2))
    for head in (policy.token_compress, policy.frame_compress):
        head.load_state_dict(make_head(32).state_dict())
    embeds, video = torch.randn(2, 24, 32), torch.zeros(2, 24, dtype=torch.bool)
    video[0, 2:20] = video[1, 4:22] = True
    with torch.no_grad():
        mine = policy(embeds, video_mask=video, grid_thw=[(2, 3, 3), (3, 2, 3)])
        with ck.use_backend("cpu"):
            theirs = policy(embeds, video_mask=video, grid_thw=[(2, 3, 3), (3, 2, 3)])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_run_the_modules_unfolded():
    head, weight = make_head(32).requires_grad_(True), torch.ones(32)
    hidden = torch.randn(6, 32)
    tokens, _ = ck.score_tokens(hidden, head, norm_weight=weight)
    tokens.sum().backward()
    assert all(p.grad is not None for p in head.parameters())
    with pytest.raises(RuntimeError, match="no gradient"):
        head.folded()(hidden)
