"""The compiled engine. Sizes and tensors are checked by its bindings; the adapters in `native/` allocate outputs."""

from collections.abc import Sequence

from torch import Tensor

compiler: str
cpu_isa: str

def attention_scores(
    query: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    row_positions: Tensor | None,
    scale: float,
    per_head: bool,
    threads: int,
    scores: Tensor,
    /,
) -> None: ...
def sample_combinations(
    token_scores: Tensor,
    frame_scores: Tensor | None,
    grid_thw: Sequence[int],
    num_samples: int,
    num_draw: Sequence[int],
    num_groups: Sequence[int],
    group_cap: Sequence[float],
    num_frame_samples: int,
    num_frames: Sequence[int],
    strict: bool,
    seed: int,
    step: int,
    threads: int,
    indices: Tensor,
    groups: Tensor,
    log_prob: Tensor,
    frame_indices: Tensor,
    frame_log_prob: Tensor,
    frame_status: Tensor,
    frame_draw_status: Tensor,
    /,
) -> None: ...
def gather_rows(
    xs: Sequence[Tensor], index: Tensor, dims: Sequence[int], fresh: bool, threads: int, outs: Sequence[Tensor], /
) -> None: ...
def scatter_rows(
    grads: Sequence[Tensor], index: Tensor, shapes: Sequence[int], fresh: bool, threads: int, outs: Sequence[Tensor], /
) -> None: ...
def expect_writes(tensor: Tensor, /) -> None: ...
def pack_masks(masks: Tensor, threads: int, words: Tensor, /) -> None: ...
def pack_indices(indices: Tensor, tokens: int, threads: int, words: Tensor, /) -> None: ...
def policy_sums(
    words: Tensor, rewards: Tensor, tokens: int, balanced: bool, weights: bool, threads: int, sums: Tensor, /
) -> None: ...
def policy_loss(
    logits: Tensor,
    old_logits: Tensor,
    sums: Tensor,
    low: float,
    high: float,
    kl_weight: float,
    threads: int,
    loss: Tensor,
    gradient: Tensor,
    /,
) -> None: ...
def repack_rows(
    xs: Sequence[Tensor],
    keep: Sequence[Tensor],
    cu_seqlens: Sequence[Tensor],
    keep_of: Sequence[int],
    cos: Sequence[Tensor],
    sin: Sequence[Tensor],
    rotated: Sequence[bool],
    placements: Sequence[int],
    zero_tail: bool,
    fresh: bool,
    threads: int,
    outs: Sequence[Tensor],
    /,
) -> None: ...
def repack_pages(
    pages: Sequence[Tensor],
    block_table: Tensor,
    seq_lens: Tensor,
    keep: Sequence[Tensor],
    keep_of: Sequence[int],
    cos: Sequence[Tensor],
    sin: Sequence[Tensor],
    rotated: Sequence[bool],
    out_block_table: Tensor | None,
    threads: int,
    new_block_table: Tensor,
    new_seq_lens: Tensor,
    freed_blocks: Tensor,
    num_freed: Tensor,
    status: Tensor,
    /,
) -> None: ...
def gumbel_topk(
    logits: Tensor,
    k: int,
    samples: int,
    seed: int,
    step: int,
    stream: int,
    threads: int,
    indices: Tensor,
    log_prob: Tensor,
    status: Tensor,
    /,
) -> None: ...
def pl_log_prob(logits: Tensor, indices: Tensor, threads: int, log_prob: Tensor, /) -> None: ...
def pl_log_prob_backward(
    grad: Tensor, logits: Tensor, indices: Tensor, threads: int, grad_logits: Tensor, /
) -> None: ...
def pl_log_prob_double_backward(
    direction: Tensor,
    grad: Tensor,
    logits: Tensor,
    indices: Tensor,
    threads: int,
    grad_grad: Tensor,
    grad_logits: Tensor,
    /,
) -> None: ...
def gumbel_noise(bits: Tensor, noise: Tensor, /) -> None: ...
def frame_pool(
    hidden: Tensor, grid_thw: Sequence[int], eps: float, threads: int, rrms: Tensor, frame_mean: Tensor, /
) -> None: ...
def allocate_budget(
    frame_scores: Tensor | None,
    grid_thw: Sequence[int],
    num_keep: Sequence[int],
    keep_ratio: float | None,
    importance_ratio: float,
    max_frame_ratio: float | None,
    strict: bool,
    counts: Tensor,
    frame_status: Tensor,
    /,
) -> None: ...
def select_tokens(
    token_scores: Tensor,
    frame_scores: Tensor | None,
    grid_thw: Sequence[int],
    num_keep: Sequence[int],
    keep_ratio: float | None,
    importance_ratio: float,
    max_frame_ratio: float | None,
    strict: bool,
    fill: bool,
    by_score: bool,
    threads: int,
    indices: Tensor,
    frame_counts: Tensor,
    frame_status: Tensor,
    /,
) -> None: ...
def segmented_topk(
    scores: Tensor,
    offsets: Sequence[int],
    k: Sequence[int],
    by_score: bool,
    threads: int,
    indices: Tensor,
    status: Tensor,
    /,
) -> None: ...
