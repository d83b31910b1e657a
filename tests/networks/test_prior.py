"""The diffusion prior's network: diffusers' PriorTransformer on the same weights, causality, what a
dropped caption hides, and the cached prefix.
"""

import pytest
import torch
from torch import Tensor

from unclip_pl.networks import text
from unclip_pl.networks.prior import PriorTextConfig, PriorTransformer, PriorTransformerConfig

NET = PriorTransformerConfig(embed_dim=12, width=32, depth=3, heads=4)
KINDS = [(kind, padding) for kind in ("states", "tokens") for padding in ("learned", "masked")]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def network(kind: str = "states", padding: str = "learned") -> PriorTransformer:
    net = PriorTransformer(
        NET,
        PriorTextConfig(kind, states_width=10, vocab_size=100, context_length=7, padding=padding),
    )
    for name in ("null_text", "null_text_embed", "query", "position_embedding"):
        torch.nn.init.normal_(getattr(net, name))
    return net.double()


def inputs(size: int = 3, length: int = 6) -> dict[str, Tensor]:
    tokens = torch.randint(1, 90, (size, length))
    ends = torch.tensor([2, 4, 3, 4])[:size]
    tokens[torch.arange(size), ends] = 99
    mask = torch.arange(length) <= ends[:, None]
    return {
        "tokens": tokens * mask,
        "mask": mask,
        "text_embed": torch.randn(size, 12).double(),
        "states": torch.randn(size, length, 10).double(),
    }


def noised(size: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 12).double(), torch.tensor([0, 500, 999, 3])[:size]


@pytest.mark.parametrize("padded", [False, True])
def test_karlos_prior_is_one_configuration_of_it(padded):
    """A small PriorTransformer of diffusers with Karlo's options, by the key map of checkpoints."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.PriorTransformer(
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=3,
        embedding_dim=12,
        num_embeddings=7,
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = PriorTransformer(
        NET, PriorTextConfig("states", states_width=12, context_length=7, padding="masked")
    )
    source = dict(theirs.state_dict())
    state = {
        "position_embedding": source.pop("positional_embedding")[0],
        "query": source.pop("prd_embedding")[0, 0],
    }
    heads = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "proj_in": "proj_in",
        "text_embed_proj": "embedding_proj",
        "text_proj": "encoder_hidden_states_proj",
        "transformer.norm": "norm_out",
        "proj_out": "proj_to_clip_embeddings",
    }
    blocks = {
        "norm1": "norm1",
        "norm2": "norm3",
        "proj": "attn1.to_out.0",
        "mlp.0": "ff.net.0.proj",
        "mlp.2": "ff.net.2",
    }
    for kind in ("weight", "bias"):
        state |= {f"{mine}.{kind}": source.pop(f"{other}.{kind}") for mine, other in heads.items()}
        for i in range(3):
            at, there = f"transformer.blocks.{i}.", f"transformer_blocks.{i}."
            state |= {
                f"{at}{mine}.{kind}": source.pop(f"{there}{other}.{kind}")
                for mine, other in blocks.items()
            }
            state[f"{at}qkv.{kind}"] = torch.cat(
                [source.pop(f"{there}attn1.to_{letter}.{kind}") for letter in "qkv"]
            )
    assert set(source) <= {"clip_mean", "clip_std", "causal_attention_mask"}
    missing = ours.load_state_dict(state, strict=False)
    assert set(missing.missing_keys) == {"null_text", "null_text_embed"}
    assert not missing.unexpected_keys

    given = inputs(length=7)
    given |= {"states": torch.randn(3, 7, 12), "text_embed": given["text_embed"].float()}
    if not padded:
        given["mask"] = torch.ones_like(given["mask"])
    x, t = torch.randn(3, 12), torch.tensor([0, 500, 999])
    with torch.no_grad():
        expected = theirs(
            x, t, given["text_embed"], given["states"], given["mask"]
        ).predicted_image_embedding
        prefix = ours.encode_text(torch.ones(3, dtype=torch.bool), **given)
        for answer in (ours(x, t, **given), ours.denoise(x, t, prefix)):
            assert (answer - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize(("kind", "padding"), KINDS)
def test_denoising_from_the_cached_prefix_equals_one_pass(kind, padding):
    net, given, (x, t) = network(kind, padding), inputs(), noised()
    keep = torch.tensor([True, False, True])
    prefix = net.encode_text(keep, **given)
    before = [kv.clone() for kv in prefix.past]
    for times in (t, t.flip(0)):
        torch.testing.assert_close(net.denoise(x, times, prefix), net(x, times, **given, keep=keep))
    assert all(torch.equal(a, b) for a, b in zip(before, prefix.past, strict=True))
    turned = net(x, t, **{key: value.flip(0) for key, value in given.items()}, keep=keep.flip(0))
    torch.testing.assert_close(
        net.denoise(x, t, prefix.index_select(torch.tensor([2, 1, 0]))), turned
    )


def test_masked_padding_is_left_out_of_the_sequence():
    net, given = network("states", "masked"), inputs()
    with torch.device("meta"):  # where no shape may depend on the captions, all positions are there
        away = network("states", "masked")
        widths = []
        away.transformer.register_forward_pre_hook(
            lambda module, args: widths.append(args[0].shape[1])
        )
        away(
            torch.zeros(3, 12).double(),
            torch.zeros(3).long(),
            **{key: value.to("meta") for key, value in given.items()},
        )
    assert widths == [7 + 4]
    # The longest caption and z_t, of 7 + 1.
    assert net.encode_text(torch.ones(3, dtype=torch.bool), **given).past[0].shape[1] == 5 + 1


def test_cutting_padding_changes_nothing(monkeypatch):
    net, given, (x, t) = network("states", "masked"), inputs(), noised()
    cut = net(x, t, **given)
    monkeypatch.setattr(text, "trim_padding", lambda x, mask: (x, mask))
    torch.testing.assert_close(net(x, t, **given), cut)
    prefix = net.encode_text(torch.ones(3, dtype=torch.bool), **given)
    assert prefix.past[0].shape[1] == 7 + 1  # nothing was cut this time


@pytest.mark.parametrize("padding", ["learned", "masked"])
def test_no_position_sees_what_comes_after_it(padding):
    net, given, (x, t) = network(padding=padding), inputs(), noised()
    sequence = []
    net.transformer.register_forward_pre_hook(
        lambda module, args: sequence.append(args[0].requires_grad_())
    )
    outputs = []
    for block in net.transformer.blocks[:-1]:
        block.register_forward_hook(lambda module, args, result: outputs.append(result[0]))
    net(x, t, **given)
    length = sequence[0].shape[1]
    assert length == (7 if padding == "learned" else 5) + 4 and len(outputs) == 2
    for i in range(length):
        gradient = torch.autograd.grad(
            outputs[-1][:, i].square().sum(), sequence[0], retain_graph=True
        )[0]
        assert not gradient[:, i + 1 :].any() and gradient[:, i].any()


@pytest.mark.parametrize(("kind", "padding"), KINDS)
def test_a_dropped_caption_hides_caption_and_embedding_and_nothing_else(kind, padding):
    net, one, two, (x, t) = network(kind, padding), inputs(), inputs(), noised()
    keep = torch.zeros(3, dtype=torch.bool)
    null = net(x, t, **one, keep=keep)
    assert torch.equal(null, net(x, t, **two, keep=keep))
    torch.testing.assert_close(null, net(x, t, keep=keep))  # nothing given at all
    assert (null - net(x + 1, t, **one, keep=keep)).abs().min(1).values.max() > 0 and (
        null - net(x, t.flip(0), **one, keep=keep)
    )[0].abs().max() > 1e-6
    for name in ("states" if kind == "states" else "tokens", "text_embed"):
        assert (net(x, t, **one) - net(x, t, **one | {name: two[name]})).abs().max() > 1e-6, name


@pytest.mark.parametrize(("kind", "padding"), KINDS)
def test_nothing_behind_the_end_of_a_caption_matters(kind, padding):
    net, given, (x, t) = network(kind, padding), inputs(), noised()
    plain = net(x, t, **given)
    hidden = ~given["mask"]
    other = given | {
        "tokens": given["tokens"] + hidden * 5,
        "states": given["states"] + hidden[..., None] * torch.randn(10),
    }
    torch.testing.assert_close(net(x, t, **other), plain)
    shorter = {k: v[:, :5] if k != "text_embed" else v for k, v in given.items()}
    torch.testing.assert_close(net(x, t, **shorter), plain)
    torch.testing.assert_close(net(x, t, **given | {"mask": None}), plain)  # found from the tokens


@pytest.mark.parametrize(("kind", "padding"), KINDS)
@pytest.mark.parametrize("keep", [True, False])
def test_every_parameter_is_in_the_graph_whatever_is_dropped(kind, padding, keep):
    net, given, (x, t) = network(kind, padding), inputs(), noised()
    net(x, t, **given, keep=torch.full((3,), keep)).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_bad_sizes_are_sentences():
    net, given, (x, t) = network(), inputs(length=9), noised()
    with pytest.raises(ValueError, match=r"9 tokens and context_length is 7"):
        net(x, t, **given)
    with pytest.raises(ValueError, match=r"PriorTextConfig.kind"):
        PriorTextConfig(kind="bytes")
    with pytest.raises(ValueError, match=r"PriorTextConfig.padding"):
        PriorTextConfig(padding="zeros")
    with pytest.raises(ValueError, match=r"context_length of at least 2"):
        PriorTextConfig(context_length=1)
    with pytest.raises(ValueError, match=r"even width"):
        PriorTransformerConfig(width=33)
