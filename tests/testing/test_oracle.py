"""The oracle against what it must equal: cases worked by hand, and the untouched model at full budget."""

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models_zoo import FAMILIES, KV_HEADS, VOCAB, prompt, tiny
from zsmerge_compile.testing import attention_hook, oracle
from zsmerge_compile.testing.attention_hook import Alibi, alibi_slopes
from zsmerge_compile.testing.oracle import Entry, Head, Oracle

ROOMY = (10, 10, 10)
WINDOWS = {"mistral-w8": 8, "mistral-w4096": 4096}


def qkv(n: int, rep: int = 1, dim: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(heads, n, dim, generator=generator) for heads in (rep, 1, 1))
    return 2 * q, k[0], v[0]


def feed(head: Head, q: Tensor, k: Tensor, v: Tensor, sizes: list[int] | None = None) -> Tensor:
    """Extend by pieces of the given sizes (one token each by default), starting at position 0."""
    outs, start = [], 0
    for size in sizes or [1] * len(k):
        piece = slice(start, start + size)
        outs.append(head.extend(q[:, piece], k[piece], v[piece], range(start, start + size)))
        start += size
    return torch.cat(outs, dim=1)


def uniform(head: Head, n: int) -> Tensor:
    """n tokens one by one, whose attention is uniform (zero queries) and whose key and value are their position."""
    places = torch.arange(float(n))[:, None]
    return feed(head, torch.zeros(1, n, 1), places, places)


def positions(entries: list[Entry]) -> list[int]:
    return [e.newest for e in entries]


def entry(key: list[float], newest: int, weight: int = 1, score: float = 0.0) -> Entry:
    return Entry(torch.tensor(key), torch.tensor(key), newest, float(newest), weight, score)


# --- one head, by hand


def test_budget_of_three_worked_out_by_hand() -> None:
    """P = C = R = 1, decay 1/2, alpha 1, uniform attention: 1/m over m single tokens, weight w counts w times."""
    head = Head((1, 1, 1), alpha=1.0, decay=0.5)
    steps = [
        # scores: 0 -> 1
        ([0], [], []),
        # 0 -> 1/2 + 1/2, 1 -> 1/2; 0 leaves the ring
        ([1], [0], []),
        # 0 -> 1/2 + 1/3, 1 -> 1/4 + 1/3, 2 -> 1/3; 1 leaves the ring and loses at once, into the free place
        ([2], [0], [(1.0, 1, 1)]),
        # 0 -> 5/12 + 1/4, 2 -> 1/6 + 1/4, 3 -> 1/4; 2 is merged with 1
        ([3], [0], [(1.5, 2, 2)]),
        # five tokens seen, four live, the merged one with attention 2/5: 0 -> 1/3 + 1/5, 3 -> 1/8 + 1/5; 3 is merged
        ([4], [0], [(2.0, 3, 3)]),
    ]
    for t, (ring, context, residual) in enumerate(steps):
        place = torch.full((1, 1), float(t))
        out = head.extend(torch.zeros(1, 1, 1), place, place, [t])
        assert out.item() == pytest.approx(t / 2)  # the mean of 0 .. t: at alpha 1 a merge costs it nothing
        assert positions(head.ring) == ring and positions(head.context) == context
        assert [(e.key.item(), e.weight, e.newest) for e in head.residual] == residual
        assert [e.mean_position for e in head.residual] == [e.value.item() for e in head.residual]
    assert head.context[0].score == pytest.approx(1 / 3 + 1 / 5)
    assert head.ring[0].score == pytest.approx(1 / 5)


def test_alpha_weighs_a_merged_entry() -> None:
    head = Head((1, 1, 1), alpha=0.5, residual=[entry([3.0], newest=3, weight=4)])
    out = head.extend(torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 1), [4])
    assert out.item() == pytest.approx(2 * 3 / (2 + 1))  # 4 ** 0.5 against 1


def test_of_equal_scores_the_oldest_leaves() -> None:
    head = Head((1, 2, 1), decay=0.0)  # a score is the last attention, the same for all
    uniform(head, 6)
    assert positions(head.context) == [3, 4]
    assert [(e.weight, e.newest) for e in head.residual] == [(3, 2)]
    assert head.margin == 0.0


def test_a_generated_token_can_win_a_context_place() -> None:
    head = Head((1, 1, 0), context=[entry([0.0], 0, score=0.3)], ring=[entry([0.0], 1, score=0.4)])
    head.extend(torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 1), [2])
    assert positions(head.context) == [1]


@pytest.mark.parametrize(
    ("keys", "chosen"),
    [([[1.0, 0.0], [0.0, 2.0], [0.0, 3.0]], 2), ([[1.0, 0.0], [0.0, 2.0], [5.0, 2.0]], 1), ([[0.0, -1.0]] * 3, 0)],
)
def test_merges_into_the_largest_product_and_of_equals_the_first_opened(keys: list[list[float]], chosen: int) -> None:
    head = Head((1, 0, 3), residual=[entry(key, i) for i, key in enumerate(keys)], ring=[entry([0.0, 1.0], 3)])
    head.extend(torch.zeros(1, 1, 2), torch.zeros(1, 2), torch.zeros(1, 2), [4])
    assert [e.weight for e in head.residual] == [1 + (i == chosen) for i in range(3)]
    mean = (torch.tensor(keys[chosen]) + torch.tensor([0.0, 1.0])) / 2
    assert torch.equal(head.residual[chosen].key, mean)


def test_order_of_opening_survives_expiry() -> None:
    """Entry 0 expires and 3 takes its place: of equal products the merge still goes to 2, opened before 3."""
    head = Head((1, 0, 2), window=5, residual=[entry([0.0], 0), entry([0.0], 2)], ring=[entry([0.0], 3)])
    for t in (4, 5):
        head.extend(torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 1), [t])
    assert [(e.newest, e.weight) for e in head.residual] == [(4, 2), (3, 1)]


@pytest.mark.parametrize("length", [1, 2, 4, 5])
def test_the_sink_survives_a_prompt_shorter_than_the_budget(length: int) -> None:
    """Every query is drawn to token 0, whose key is large; budget 6."""
    q, k, v = torch.ones(1, 40, 1), torch.zeros(40, 1), torch.arange(40.0)[:, None]
    k[0] = 4.0
    head = Head((2, 2, 2))
    feed(head, q, k, v, [length] + [1] * (40 - length))
    assert head.context[0].newest == 0 and head.context[0].weight == 1
    assert positions(head.ring) == [38, 39]


def test_what_expires_makes_room_before_a_victim_is_sought() -> None:
    """Window 5, P = C = R = 1, uniform attention at decay 1, so that older tokens have higher scores."""
    head = Head((1, 1, 1), decay=1.0, window=5)
    seen = []
    places = torch.arange(8.0)[:, None]
    for t in range(8):
        head.extend(torch.zeros(1, 1, 1), places[t : t + 1], places[t : t + 1], [t])
        seen.append((positions(head.context), [(e.newest, e.weight) for e in head.residual]))
    assert seen[3:] == [
        ([0], [(2, 2)]),  # 2 lost against 0 and joined 1
        ([3], [(2, 2)]),  # token 5 will not see 0: it goes unmerged, and 3 finds its place free
        ([3], [(4, 3)]),
        ([3], [(5, 4)]),  # visible as long as its newest member is
        ([6], [(5, 4)]),
    ]


def test_no_member_of_a_merged_entry_outlives_the_window() -> None:
    head = Head((1, 0, 1), window=3, residual=[entry([0.0], 1, weight=2)], ring=[entry([0.0], 3)])
    head.extend(torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 1), [4])  # token 5 sees 3 and 4
    assert [(e.newest, e.weight) for e in head.residual] == [(3, 1)]


@pytest.mark.parametrize(
    ("merge", "expected"),
    [("segment", [(3, 2, 1.0), (2, 4, 3.5), (2, 6, 5.5)]), ("sequential", [(1, 0, 0.0), (1, 1, 1.0), (5, 6, 4.0)])],
)
def test_a_prompt_fills_the_residual(merge: Any, expected: list[tuple[int, int, float]]) -> None:
    """Tokens 0 .. 6 leave; keys grow with the position, so that one by one each joins the last place opened."""
    head = Head((1, 0, 3), merge=merge)
    places = torch.arange(8.0)[:, None]
    head.extend(torch.zeros(1, 8, 1), places, places, range(8))
    assert [(e.weight, e.newest, e.value.item()) for e in head.residual] == expected


def test_segments_take_free_places_first_and_then_merge_as_weighted_means() -> None:
    """Two places, one filled; 4, 5, 6 leave as [4, 5] and [6]: the pair opens a place, 6 joins the larger product."""
    head = Head((1, 0, 2), residual=[entry([-1.0], 3, weight=3)])
    places = torch.tensor([4.0, 5.0, 6.0, 7.0])[:, None]
    head.extend(torch.zeros(1, 4, 1), places, places, range(4, 8))
    assert [(e.weight, e.newest, e.key.item()) for e in head.residual] == [(3, 3, -1.0), (3, 6, 5.0)]
    head.extend(torch.zeros(1, 4, 1), -places, -places, range(8, 12))  # leaving: 7, -4 (mean 1.5) and -5, -6
    assert [(e.weight, e.newest) for e in head.residual] == [(5, 10), (5, 8)]
    assert [e.key.item() for e in head.residual] == pytest.approx([(3 * -1 - 5 - 6) / 5, (3 * 5 + 7 - 4) / 5])


def test_several_tokens_score_by_the_closed_form() -> None:
    """score = decay^n * score + sum_j decay^(n-j) * attention_j, summed over the query heads."""
    q, k, v = qkv(7, rep=3)
    head = Head((20, 0, 0), decay=0.9)
    feed(head, q, k, v, [4, 3])
    logits = (q @ k.T / 2).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
    decays = 0.9 ** torch.arange(6, -1, -1.0)
    expected = (decays[:, None] * logits.softmax(-1).sum(0)).sum(0)
    assert torch.allclose(torch.tensor([e.score for e in head.ring]), expected)


# --- one head, what must hold for any tokens


@pytest.mark.parametrize("split", [(3, 2, 2), (1, 1, 1), (2, 0, 3), (4, 3, 0)])
def test_the_first_budget_plus_one_outputs_are_full_attention(split: tuple[int, int, int]) -> None:
    budget = sum(split)
    q, k, v = qkv(budget + 1, rep=2)
    head = Head(split)
    out = feed(head, q[:, :budget], k[:budget], v[:budget])
    assert all(e.weight == 1 for e in head.entries) and len(head.entries) == budget
    last = head.extend(q[:, budget:], k[budget:], v[budget:], [budget])
    full = F.scaled_dot_product_attention(q, k.expand(2, -1, -1), v.expand(2, -1, -1), is_causal=True)
    assert torch.allclose(torch.cat([out, last], dim=1), full, atol=1e-6)
    assert sum(e.weight for e in head.entries) == budget + (split[2] > 0)


@pytest.mark.parametrize("merge", ["segment", "sequential"])
@pytest.mark.parametrize("sizes", [[1] * 60, [50] + [1] * 10, [7, 20, 1, 1, 30, 1]])
def test_weights_and_moments_are_conserved(merge: Any, sizes: list[int]) -> None:
    q, k, v = qkv(60, rep=2)
    head = Head((3, 4, 2), merge=merge)
    feed(head, q, k, v, sizes)
    assert sum(e.weight for e in head.entries) == 60
    assert positions(head.ring) == [57, 58, 59]
    assert torch.allclose(sum(e.weight * e.key for e in head.entries), k.sum(0), atol=1e-4)
    assert torch.allclose(sum(e.weight * e.value for e in head.entries), v.sum(0), atol=1e-4)


def test_unmerged_tokens_lose_no_attention() -> None:
    """Theorem 3.1."""
    q, k, v = qkv(50, rep=1)
    head = Head((3, 4, 3), dtype=torch.float64)
    feed(head, q, k, v)
    full = (q[0, -1:] @ k.T / 2).softmax(-1)[0]
    logits = torch.stack([e.key for e in head.entries]).float() @ q[0, -1] / 2
    weights = torch.tensor([float(e.weight) for e in head.entries])
    compensated = (logits + 0.6 * weights.log()).softmax(-1)
    for e, mine in zip(head.entries, compensated, strict=True):
        assert e.weight > 1 or mine >= full[e.newest] - 1e-7


# --- the model behind it


def untouched(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the last column [b, vocab], by the model as it is."""
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    return out[:, -1]


def assert_follows(mine: Oracle, model: nn.Module, chunk: int | None, length: int, steps: int) -> None:
    """A left-padded prompt and then token by token: logits within 1e-4 of their range."""
    x, fed = prompt(3, length, pads=(0, 3, 6)), prompt(3, steps, seed=1)["input_ids"]
    ids, mask = x["input_ids"], x["attention_mask"]
    logits = mine.prefill(ids, mask, chunk=chunk)
    for step in range(steps + 1):
        expected = untouched(model, ids, mask)
        error = (logits - expected).abs().max() / (expected.max() - expected.min())
        assert error <= 1e-4, f"step {step}: {error:.1e} of the range"
        if step < steps:
            token = fed[:, step : step + 1]
            ids, mask = torch.cat([ids, token], dim=1), F.pad(mask, (0, 1), value=1)
            logits = mine.decode(token)


@pytest.mark.parametrize(("attn", "chunk"), [("sdpa", None), ("eager", 5)])
@pytest.mark.parametrize("name", FAMILIES)
def test_full_budget_is_the_untouched_model(name: str, attn: str, chunk: int | None) -> None:
    model = tiny(name, attn=attn)
    mine = Oracle(model, [ROOMY] * 2, [WINDOWS.get(name)] * 2, batch=3)
    assert mine.kv_heads == KV_HEADS[name]
    assert_follows(mine, model, chunk, length=14, steps=10)
    assert mine.seen == [24, 21, 18]


@pytest.mark.parametrize("chunk", [None, 5])
def test_a_budget_of_the_window_is_the_windowed_model_at_any_length(chunk: int | None) -> None:
    model = tiny("mistral-w8")
    mine = Oracle(model, [(4, 3, 1), (1, 5, 2)], [8, 8], batch=3)
    assert_follows(mine, model, chunk, length=17, steps=15)
    assert all(e.weight == 1 for layer in mine.heads for row in layer for head in row for e in head.entries)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "falcon-7b", "falcon-new"])
def test_full_budget_in_bfloat16(name: str) -> None:
    x = prompt(3, 24, pads=(0, 3, 6))
    model, eager = tiny(name, torch.bfloat16), tiny(name, torch.bfloat16, attn="eager")
    expected, other = (untouched(m, x["input_ids"], x["attention_mask"]) for m in (model, eager))
    logits = Oracle(model, [ROOMY] * 2, batch=3).prefill(x["input_ids"], x["attention_mask"])
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().max() <= 2 * (other - expected).abs().max()


@pytest.mark.parametrize("heads", [1, 3, 4, 12, 32, 71])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alibi_is_that_of_transformers_to_the_bit(heads: int, dtype: torch.dtype) -> None:
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 600, dtype=torch.int64), heads, dtype)[:, 0] / math.sqrt(48)
    mine = Alibi(alibi_slopes(heads), dtype)([float(p) for p in range(600)], [1] * 600, 48)
    assert torch.equal(mine, theirs.float())


def test_alibi_of_a_merged_entry_is_not_rounded() -> None:
    bias = Alibi(torch.tensor([0.3]), torch.bfloat16)([1000.5, 1000.5], [2, 1], 16)
    assert bias[0, 0].item() == pytest.approx(0.3 * 1000.5 / 4)
    assert bias[0, 1].item() != pytest.approx(0.3 * 1000.5 / 4, rel=1e-4)


def summary(mine: Oracle, row: int) -> list[list[tuple[int, int, float]]]:
    """(newest, weight, score) of every entry in a row, head by head."""
    heads = [head for layer in mine.heads for head in layer[row]]
    return [[(e.newest, e.weight, pytest.approx(e.score, rel=1e-4)) for e in head.entries] for head in heads]


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-w8", "falcon-rw"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_past_the_budget_padding_and_other_rows_change_nothing(name: str, chunk: int | None) -> None:
    model, windows = tiny(name), [WINDOWS.get(name)] * 2
    x, fed = prompt(3, 30, pads=(0, 5, 29)), prompt(3, 12, seed=1)["input_ids"]
    together = Oracle(model, [(3, 3, 2), (2, 2, 1)], windows, batch=3)
    logits = [together.prefill(x["input_ids"], x["attention_mask"], chunk)]
    logits += [together.decode(fed[:, i : i + 1]) for i in range(12)]
    for row, pad in enumerate((0, 5, 29)):
        alone = Oracle(model, [(3, 3, 2), (2, 2, 1)], windows)
        own = [alone.prefill(x["input_ids"][row : row + 1, pad:], chunk=chunk)]
        own += [alone.decode(fed[row : row + 1, i : i + 1]) for i in range(12)]
        assert torch.allclose(torch.cat(own), torch.stack([step[row] for step in logits]), atol=1e-4)
        assert summary(alone, 0) == summary(together, row)


@pytest.mark.parametrize("name", ["llama-gqa", "falcon-rw"])
def test_chunks_of_one_are_decode_steps_and_one_large_chunk_is_full(name: str) -> None:
    model, ids = tiny(name), prompt(1, 20)["input_ids"]
    chunked, stepped, whole, large = (Oracle(model, [(3, 3, 2)] * 2) for _ in range(4))
    last = chunked.prefill(ids, chunk=1)
    for i in range(20):
        step = stepped.decode(ids[:, i : i + 1])
    assert torch.allclose(last, step) and summary(chunked, 0) == summary(stepped, 0)
    assert torch.equal(whole.prefill(ids), large.prefill(ids, chunk=20)) and summary(whole, 0) == summary(large, 0)


def test_chunks_are_aligned_at_the_right() -> None:
    lengths: list[int] = []
    model = tiny("llama-gqa")

    def call(model: Any, ids: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        lengths.append(ids.shape[1])
        return untouched(model, ids, mask)

    Oracle(model, [(3, 3, 2)] * 2, call=call).prefill(prompt(1, 12)["input_ids"], chunk=5)
    assert lengths == [2, 5, 5]


def test_a_second_prompt_continues_and_rows_are_separate() -> None:
    model = tiny("llama-gqa")
    x = prompt(2, 12, pads=(0, 4))
    mine = Oracle(model, [ROOMY] * 2, batch=2)
    mine.prefill(x["input_ids"][:, :5], x["attention_mask"][:, :5])
    logits = mine.prefill(x["input_ids"][:, 5:])
    assert torch.allclose(logits, untouched(model, x["input_ids"], x["attention_mask"]), atol=1e-4)
    before = summary(mine, 0)
    mine.decode(x["input_ids"][:, :1], active=torch.tensor([False, True]))
    mine.reset(rows=[1])
    refilled = mine.prefill(x["input_ids"][:1], rows=[1])
    assert torch.allclose(refilled, untouched(model, x["input_ids"][:1], x["attention_mask"][:1]), atol=1e-4)
    assert summary(mine, 0) == before and mine.seen == [12, 12]


class OwnDecoder(nn.Module):
    """One layer that repeats its two KV heads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, 32), nn.Linear(16, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(ids)).unflatten(-1, (8, 4)).transpose(1, 2).split([4, 2, 2], dim=1)
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=ids.shape[1] > 1)
        logits: Tensor = self.head(mixed.transpose(1, 2).flatten(2))
        return logits[:, -1]


def test_a_decoder_that_is_not_from_transformers() -> None:
    torch.manual_seed(0)
    model, ids = OwnDecoder(), prompt(1, 16)["input_ids"]
    mine = Oracle(model, [ROOMY], kv_heads=2, call=lambda model, ids, mask, places: model(ids))
    mine.prefill(ids[:, :10])
    for i in range(10, 16):
        logits = mine.decode(ids[:, i : i + 1])
    assert torch.allclose(logits, model(ids), atol=1e-5)
    assert len(mine.heads[0][0]) == 2 and mine.heads[0][0][0].ring[0].key.shape == (4,)


@pytest.mark.parametrize("name", ["llama-gqa", "falcon-rw"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_model_is_given_back_even_after_an_error(name: str, attn: str) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, x = tiny(name, attn=attn), prompt(1, 6)
    before, names = untouched(model, x["input_ids"], x["attention_mask"]), set(ALL_ATTENTION_FUNCTIONS)
    with pytest.raises(RuntimeError, match="one for each of 1 layers, got more"):
        Oracle(model, [ROOMY]).prefill(x["input_ids"])
    with pytest.raises(RuntimeError, match="one for each of 3 layers, got fewer"):
        Oracle(model, [ROOMY] * 3).prefill(x["input_ids"])
    assert model.config._attn_implementation == attn and set(ALL_ATTENTION_FUNCTIONS) == names
    assert torch.equal(untouched(model, x["input_ids"], x["attention_mask"]), before)


@pytest.mark.parametrize("module", [oracle, attention_hook])
def test_shares_nothing_with_what_it_checks(module: Any) -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    froms = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    own = {name for name in froms + names if name.startswith("zsmerge_compile")}
    assert own <= {"zsmerge_compile.testing.attention_hook"}
