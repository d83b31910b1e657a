"""The AR prior's network: it is causal, the null knows no text, one token at a time equals all at
once, and nucleus and temperature do what they say.
"""

from dataclasses import replace

import pytest
import torch

from unclip_pl.networks.ar_prior import ARPriorConfig, ARPriorNet, sample_top_p
from unclip_pl.networks.text import TextConfig

CONFIG = ARPriorConfig(embed_dim=12, width=32, depth=2, heads=4, max_codes=6, buckets=16)
TEXTS = {
    "states": TextConfig(kind="states", states_width=10, context_length=8),
    "transformer": TextConfig(
        kind="transformer", vocab_size=50, context_length=8, width=16, depth=1, heads=2
    ),
    "embeddings": TextConfig(
        kind="transformer", vocab_size=50, context_length=8, width=16, depth=0, heads=2
    ),
    "none": TextConfig(),
}


@pytest.fixture(params=TEXTS)
def net(request) -> ARPriorNet:
    torch.manual_seed(0)
    model = ARPriorNet(CONFIG, TEXTS[request.param]).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def text(size: int = 3, seed: int = 1) -> dict:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 49, (size, 7), generator=generator)
    return {
        "text_embed": torch.randn(size, 12, generator=generator).double(),
        "tokens": tokens,
        "mask": torch.arange(7) <= torch.tensor([[4], [6], [2]]),
        "states": torch.randn(size, 7, 10, generator=generator).double(),
        "dot": torch.randint(0, 16, (size,), generator=generator),
    }


YES, NO = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
CODES = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])


def test_no_code_is_seen_before_its_time(net):
    held = {}
    net.code_embedding.register_forward_hook(
        lambda *a: held.update(codes=a[2]) or a[2].retain_grad()
    )
    prefix = net.prefix(YES, **text())
    prefix.retain_grad()
    logits = net(prefix, CODES)
    assert logits.shape == (3, 6, 16)
    for position in range(6):
        prefix.grad = held["codes"].grad = None
        (logits[:, position] * torch.randn(3, 16)).sum().backward(retain_graph=True)
        seen = torch.zeros(3, 5) if held["codes"].grad is None else held["codes"].grad.abs().sum(-1)
        assert (seen[:, position:] == 0).all() and (seen[:, :position] > 0).all()
        assert (prefix.grad.abs().sum(-1) > 0).all()


def test_the_dot_product_stands_before_the_codes_or_before_everything(net):
    given = text()
    after, first = net, ARPriorNet(replace(CONFIG, dot_first=True), net.text.config).double()
    first.load_state_dict(after.state_dict())
    for model, place in ((after, -1), (first, 0)):
        changed = model.prefix(YES, **given | {"dot": (given["dot"] + 1) % 16})
        moved = (changed - model.prefix(YES, **given)).abs().sum(-1) > 0  # (B, L + 2)
        assert moved[:, place].all() and moved.sum() == 3
        assert model.prefix(YES, **given).shape == (3, net.length + 2, 32)


def test_every_part_of_the_text_matters_and_padding_does_not(net):
    given = text()
    plain = net.prefix(YES, **given)
    changed = {"text_embed": given["text_embed"] + 1, "dot": (given["dot"] + 1) % 16}
    if net.length:
        part = "states" if net.padding_embedding is not None else "tokens"
        changed[part] = given[part].clone()
        changed[part][:, 1] += 1
        hidden = given[part].clone()
        hidden[0, 5:] = hidden[0, 5:] * 0 + 1  # beyond the first caption's mask
        assert torch.equal(net.prefix(YES, **given | {part: hidden})[0], plain[0])
    for name, value in changed.items():
        assert (net.prefix(YES, **given | {name: value}) != plain).flatten(1).any(1).all(), name
    assert plain.shape == (3, net.length + 2, 32)


def test_null_depends_on_nothing_of_the_text(net):
    null = net.prefix(NO, **text())
    assert torch.equal(null, net.prefix(NO, **text(seed=2))) and torch.equal(null[0], null[1])
    with torch.no_grad():  # no text at all
        torch.testing.assert_close(null, net.prefix(YES), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(null, net.prefix(NO), rtol=1e-12, atol=1e-12)
    mixed = net.prefix(torch.tensor([True, False, True]), **text())
    torch.testing.assert_close(mixed[1], null[1])
    torch.testing.assert_close(mixed[[0, 2]], net.prefix(YES, **text())[[0, 2]])


def plain_draw(net, prefix, uniform, null=None, scale=1.0, temperature=1.0, top_p=1.0):
    """Each code from a pass over everything before it."""
    codes = torch.zeros(len(prefix), 0, dtype=torch.int64)
    for k in range(uniform.shape[1]):
        logits = net(prefix, codes)[:, -1]
        if null is not None:
            without = net(null, codes)[:, -1]
            logits = without + scale * (logits - without)
        codes = torch.cat(
            [codes, sample_top_p(logits, uniform[:, k], temperature, top_p)[:, None]], dim=1
        )
    return codes


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cached_drawing_equals_the_plain_one(net, scale):
    uniform = torch.rand(3, 6)
    prefix, null = net.prefix(YES, **text()), None if scale == 1 else net.prefix(NO, **text())
    before = prefix.clone()
    steps = []
    cached = net.generate(
        prefix, uniform, null, scale, 0.8, 0.9, callback=lambda *step: steps.append(step)
    )
    assert torch.equal(cached, plain_draw(net, prefix, uniform, null, scale, 0.8, 0.9))
    assert steps == [(k, 6) for k in range(1, 7)] and torch.equal(prefix, before)
    assert len({tuple(row) for row in cached.tolist()}) == 3


def test_guidance_of_one_equals_none(net):
    uniform, prefix, null = torch.rand(3, 6), net.prefix(YES, **text()), net.prefix(NO, **text())
    assert torch.equal(net.generate(prefix, uniform), net.generate(prefix, uniform, null, 1.0))
    assert not torch.equal(net.generate(prefix, uniform), net.generate(prefix, uniform, null, 20.0))


def test_every_parameter_gets_a_gradient(net):
    keep = torch.tensor([True, False, True])
    net(net.prefix(keep, **text()), CODES).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_caption_longer_than_its_positions_is_a_sentence(net):
    if net.length:
        with pytest.raises(ValueError, match=r"9 tokens and (text\.)?context_length is 8"):
            net.prefix(
                YES,
                **text()
                | {
                    "tokens": torch.ones(3, 9).long(),
                    "states": torch.zeros(3, 9, 10).double(),
                    "mask": None,
                },
            )


def slow_pick(logits: list[float], u: float, temperature: float, top_p: float) -> int:
    weights = torch.tensor(logits, dtype=torch.float64).div(temperature).exp().tolist()
    shares = [w / sum(weights) for w in weights]
    kept, mass = [], 0.0
    for b in sorted(range(len(shares)), key=lambda b: -shares[b]):
        if mass >= top_p:
            break
        kept.append(b)
        mass += shares[b]
    upto = 0.0
    for b in sorted(kept):
        upto += shares[b]
        if upto > u * mass:
            return b
    return max(kept)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.8, 1.0])
def test_temperature_and_nucleus_against_a_slow_reference(temperature, top_p):
    torch.manual_seed(4)
    logits, u = torch.randn(300, 12).double() * 2, torch.rand(300)
    expected = [
        slow_pick(row.tolist(), float(v), temperature, top_p)
        for row, v in zip(logits, u, strict=True)
    ]
    assert sample_top_p(logits, u.double(), temperature, top_p).tolist() == expected


def test_draws_have_the_distribution_and_zero_temperature_has_the_mode():
    logits = torch.tensor([0.5, 2.0, -1.0, 1.0, -1e9])
    drawn = sample_top_p(
        logits.expand(40000, -1), torch.rand(40000, generator=torch.Generator().manual_seed(0))
    )
    assert (drawn.bincount(minlength=5) / 40000 - logits.softmax(0)).abs().max() < 0.01
    assert (sample_top_p(logits.expand(9, -1), torch.rand(9), temperature=0) == 1).all()
    # Never one of no probability.
    assert sample_top_p(logits[None], torch.tensor([1 - 2**-24])).item() == 3
    before = logits.clone()
    sample_top_p(logits[None], torch.tensor([0.5]), 0.5, 0.5)
    assert torch.equal(logits, before)


def test_neighbouring_buckets_begin_alike():
    net = ARPriorNet(
        ARPriorConfig(embed_dim=12, width=64, depth=1, heads=4, max_codes=6, buckets=256),
        TextConfig(),
    )
    for table in (net.code_embedding.weight, net.head.weight, net.dot_embedding.weight[:256]):
        near, far = (
            (table[shift:] - table[:-shift]).norm() / table[shift:].norm() for shift in (1, 128)
        )
        assert near < 0.15 and far > 1 and 0.01 < table.std() < 0.04


@pytest.mark.parametrize(
    ("name", "value"),
    [("heads", 0), ("depth", 0), ("width", -4), ("embed_dim", 0), ("max_codes", 0), ("buckets", 1)],
)
def test_impossible_sizes_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"ARPriorConfig\.{name} is {value}: give"):
        replace(CONFIG, **{name: value})
