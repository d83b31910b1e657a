"""The causal Transformer: no token sees later ones, padding, cached keys and values, `last`."""

import math

import pytest
import torch

from unclip_pl.networks.layers import attention
from unclip_pl.networks.transformer import Transformer


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(32, 3, 4, causal=True).double()


def naive(q: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Causal attention token by token, in the input's type."""
    (size, queries, heads, width), keys = q.shape, kv.shape[1]
    out = torch.zeros_like(q)
    for b in range(size):
        for i in range(queries):
            seen = [j for j in range(keys - queries + i + 1) if mask is None or mask[b, j]]
            for h in range(heads):
                scores = torch.stack([q[b, i, h] @ kv[b, j, 0, h] for j in seen])
                weights = (scores / math.sqrt(width)).softmax(0)
                out[b, i, h] = sum(w * kv[b, j, 1, h] for w, j in zip(weights, seen, strict=True))
    return out.flatten(2)


@pytest.mark.parametrize("queries", [1, 3, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_causal_attention_against_token_by_token(queries, padded):
    torch.manual_seed(1)
    q = torch.randn(2, queries, 2, 4, dtype=torch.float64)
    kv = torch.randn(2, 5, 2, 2, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 1, 1, 1]]).bool() if padded else None
    torch.testing.assert_close(attention(q, *kv.unbind(2), mask, causal=True), naive(q, kv, mask))


def test_no_token_sees_what_follows(model):
    x = torch.randn(2, 6, 32, dtype=torch.float64, requires_grad=True)
    (model(x)[:, 2] * torch.randn(2, 32, dtype=torch.float64)).sum().backward()
    assert x.grad[:, 3:].abs().max() == 0 and (x.grad[:, :3].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("padded", [False, True])
def test_going_on_equals_all_at_once(model, padded):
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    mask = torch.tensor([[1] * 7, [1, 1, 0, 0, 1, 1, 1]]).bool() if padded else None
    whole = model(x, mask)
    first, past = model.extend(x[:, :4], None, None if mask is None else mask[:, :4])
    before = [kv.clone() for kv in past]
    second, longer = model.extend(x[:, 4:6], past, None if mask is None else mask[:, :6])
    third, _ = model.extend(x[:, 6:], longer, mask)
    torch.testing.assert_close(torch.cat([first, second, third], dim=1), whole)
    unchanged = [torch.equal(a, b) for a, b in zip(past, before, strict=True)]
    assert all(unchanged)  # not in place


def test_last_outputs_alone_are_the_same(model):
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    mask = torch.tensor([[True] * 6, [True, False, False, True, True, True]])
    for last in (1, 3, 6):
        some = mask[:, -last:]
        torch.testing.assert_close(model(x, mask, last=last)[some], model(x, mask)[:, -last:][some])
        torch.testing.assert_close(model(x, last=last), model(x)[:, -last:])
    (none, past), (_, expected) = model.extend(x, None, mask, last=0), model.extend(x, None, mask)
    assert none.shape == (2, 0, 32)
    for kept, whole in zip(past, expected, strict=True):
        torch.testing.assert_close(kept, whole)


@pytest.mark.parametrize("last", [None, 1])
def test_hidden_tokens_change_nothing(model, last):
    """Each row equals that of its visible tokens only, gradients too."""
    x = torch.randn(3, 6, 32, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor(
        [
            [True] * 6,
            [True, False, False, True, False, True],
            [False, False, True, True, True, True],
        ]
    )
    out = model(x, mask.index_fill(0, torch.tensor([2]), True), last=last)
    assert out.isfinite().all()
    mask = mask[:2]
    out = model(x[:2], mask, last=last)
    weight = torch.randn(32, dtype=torch.float64)
    visible = out[mask] if last is None else out
    (grad,) = torch.autograd.grad(visible.square().mul(weight).sum(), x)
    for b in range(2):
        own = x.detach()[b, mask[b]].requires_grad_()
        expected = model(own[None], last=last)[0]
        torch.testing.assert_close(out[b][mask[b]] if last is None else out[b], expected)
        (own_grad,) = torch.autograd.grad(expected.square().mul(weight).sum(), own)
        torch.testing.assert_close(grad[b][mask[b]], own_grad)
    assert not grad[:2][~mask].any()


def test_one_that_is_not_causal_cannot_go_on():
    plain = Transformer(32, 1, 4)
    _, past = plain.extend(torch.randn(1, 3, 32), None)
    with pytest.raises(ValueError, match="not causal"):
        plain.extend(torch.randn(1, 1, 32), past)
