"""Captions as context: dropping, masks, padding, gradients in every case."""

import dataclasses

import pytest
import torch

from unclip_pl.networks.text import TextConfig, TextContext
from unclip_pl.networks.transformer import Transformer, TransformerBlock
from unclip_pl.utils.tokens import caption_mask

STATES = TextConfig(kind="states", states_width=10)
TRANSFORMER = TextConfig(
    kind="transformer", vocab_size=50, context_length=8, width=32, depth=2, heads=4
)
WIDTHS = {"context_width": 16, "pooled_width": 32, "embed_dim": 6}
YES, NO = torch.tensor([True, True]), torch.tensor([False, False])
MIXED = torch.tensor([True, False])


@pytest.fixture(autouse=True)
def _one_thread(_threads_and_argv):
    torch.set_num_threads(1)
    torch.manual_seed(0)


def captions(length: int = 6) -> dict:
    tokens = torch.zeros(2, length, dtype=torch.int64)
    tokens[0, :4] = torch.tensor([48, 3, 5, 49])
    tokens[1, :3] = torch.tensor([48, 7, 49])
    return {
        "tokens": tokens,
        "mask": caption_mask(tokens),
        "text_embed": torch.randn(2, 6),
        "states": torch.randn(2, length, 10),
    }


def other(given: dict) -> dict:
    """Other captions of the same lengths."""
    return given | {
        "tokens": (given["tokens"] + 11) % 48,
        "text_embed": given["text_embed"] + 1,
        "states": given["states"] - 1,
    }


@pytest.mark.parametrize("config", [STATES, TRANSFORMER], ids=["states", "transformer"])
class TestBothKinds:
    def test_shapes(self, config):
        length = 4 if config is STATES else 8  # the longest visible caption, or all positions
        context, mask, pooled = TextContext(config, **WIDTHS)(**captions(), keep=MIXED)
        assert context.shape == (2, length, 16) and pooled.shape == (2, 32)
        assert (mask is None) == (config is TRANSFORMER)

    def test_a_dropped_caption_has_no_influence(self, config):
        text = TextContext(config, **WIDTHS).eval()
        given = captions()
        a, b = text(**given, keep=MIXED), text(**other(given), keep=MIXED)
        for x, y in zip(a, b, strict=True):
            if x is not None and x.dtype != torch.bool:
                assert torch.equal(x[1], y[1]) and not torch.equal(x[0], y[0])
        longer = text(**given | {"mask": torch.ones_like(given["mask"])}, keep=MIXED)
        if a.mask is None:
            assert torch.equal(a.context[1], longer.context[1])
        else:
            assert torch.equal(a.context[1][a.mask[1]], longer.context[1][longer.mask[1]])

    def test_a_missing_caption_is_a_dropped_one(self, config):
        text = TextContext(config, **WIDTHS).eval()
        dropped, missing = text(**captions(), keep=NO), text(keep=YES)
        seen = 2 if config is STATES else 8
        assert missing.context.shape[1] == seen  # nothing is computed for what is hidden
        torch.testing.assert_close(dropped.context[:, :seen], missing.context[:, :seen])
        torch.testing.assert_close(dropped.pooled, missing.pooled)
        assert dropped.mask is None and missing.mask is None

    @pytest.mark.parametrize("keep", [YES, NO, MIXED], ids=["kept", "dropped", "mixed"])
    def test_all_parameters_are_in_the_graph(self, config, keep):
        text = TextContext(config, **WIDTHS)
        found = text(**captions(), keep=keep)
        (found.context.square().sum() + found.pooled.sum()).backward()
        assert all(p.grad is not None for p in text.parameters())

    def test_gradients_are_not_zero(self, config):
        text = TextContext(config, **WIDTHS)
        found = text(**captions(), keep=MIXED)
        (found.context @ torch.randn(16)).sum().add(found.pooled.sum()).backward()
        assert not [name for name, p in text.named_parameters() if not p.grad.any()]

    def test_training_without_captions_is_refused(self, config):
        with pytest.raises(ValueError, match="trains on"):
            TextContext(config, **WIDTHS)(keep=YES)

    def test_all_kept_is_the_default(self, config):
        text = TextContext(config, **WIDTHS).eval()
        given = captions()
        assert torch.equal(text(**given).context, text(**given, keep=YES).context)


def test_hidden_tokens_have_no_influence():
    given = captions()
    transformer = TextContext(TRANSFORMER, **WIDTHS).eval()
    noisy = torch.where(given["mask"], given["tokens"], 33)
    assert torch.equal(
        transformer(**given).context, transformer(**(given | {"tokens": noisy})).context
    )
    states = TextContext(STATES, **WIDTHS).eval()
    noisy = torch.where(given["mask"][..., None], given["states"], 9.0)
    a, b = states(**given), states(**(given | {"states": noisy}))
    assert torch.equal(a.context[a.mask], b.context[b.mask]) and torch.equal(
        a.mask, given["mask"][:, :4]
    )


def test_mask_is_found_from_the_tokens():
    given = captions()
    assert given["mask"].sum(dim=1).tolist() == [4, 3]
    for config in (STATES, TRANSFORMER):
        text = TextContext(config, **WIDTHS).eval()
        assert torch.equal(text(**(given | {"mask": None})).context, text(**given).context)


def test_transformer_pads_short_captions_and_refuses_long_ones():
    text = TextContext(TRANSFORMER, **WIDTHS).eval()
    short = captions(5)
    padded = text(**captions(8))
    torch.testing.assert_close(text(short["tokens"]).context, padded.context)
    with pytest.raises(ValueError, match="context_length is 8"):
        text(torch.zeros(2, 9, dtype=torch.int64))


def test_transformer_sees_both_ways_and_causal_only_back():
    for causal in (False, True):
        x = torch.randn(1, 5, 32, requires_grad=True)
        (Transformer(32, 2, 4, causal=causal)(x)[0, 2] @ torch.randn(32)).backward()
        reached = x.grad[0].abs().sum(-1) > 1e-6
        assert reached.tolist() == [True, True, True, not causal, not causal]


def test_transformer_mask_and_checkpointing():
    x = torch.randn(2, 5, 32)
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    net, saving = Transformer(32, 2, 4), Transformer(32, 2, 4, checkpointing="full")
    saving.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(x, mask)[0, :3], net(x[:1, :3])[0], rtol=1e-5, atol=1e-5)
    for each in (net, saving):
        each(x, mask).square().mean().backward()
    for a, b in zip(net.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_paper_size_of_the_text_transformer():
    """24 x 2048 is 1.2 billion: 12 L d^2 and biases."""
    with torch.device("meta"):
        block = TransformerBlock(2048, 32)
    assert sum(p.numel() for p in block.parameters()) == 12 * 2048**2 + 13 * 2048


def test_none_gives_nothing():
    assert TextContext(TextConfig())(keep=YES) == (None, None, None)
    assert not list(TextContext(TextConfig()).parameters())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "rnn"}, "TextConfig.kind"),
        ({"kind": "states"}, "states_width"),
        ({"kind": "states", "states_width": 4, "null": "zeros"}, "TextConfig.null"),
        ({"kind": "none", "null": "empty"}, 'kind "states" only'),
        ({"kind": "transformer", "width": 30, "heads": 4}, "heads 4"),
        ({"kind": "transformer", "depth": -1}, r"TextConfig\.depth is -1: give 0"),
        ({"kind": "transformer", "context_length": 0}, r"\.context_length is 0: give 1"),
        ({"kind": "transformer", "vocab_size": 0}, r"\.vocab_size is 0: give 1"),
        ({"kind": "transformer", "width": -8}, r"\.width is -8: give 1"),
        ({"kind": "transformer", "heads": 0}, r"\.heads is 0: give 1"),
        ({"kind": "states", "states_width": 4, "context_length": -1}, "context_length is -1"),
    ],
)
def test_impossible_configs_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        TextConfig(**arguments)


def test_caption_without_a_context_to_go_into_is_refused():
    with pytest.raises(ValueError, match="set context_width of the U-Net"):
        TextContext(STATES)


def test_without_pooled_the_text_embedding_reaches_nothing():
    text = TextContext(dataclasses.replace(STATES, pooled=False), **WIDTHS).eval()
    given = captions()
    a, b = text(**given), text(**given | {"text_embed": given["text_embed"] + 1})
    assert a.pooled is None and torch.equal(a.context, b.context)
    text.train()
    assert text(**given | {"text_embed": None}).context.requires_grad  # nor is it asked for


def test_an_empty_null_is_what_the_empty_caption_gives():
    config = dataclasses.replace(STATES, null="empty")
    text = TextContext(config, **WIDTHS).eval()
    states, embed = torch.randn(2, 10), torch.randn(6)
    text.set_null(states, embed)
    empty = text(tokens=torch.tensor([[48, 49]]), states=states[None], text_embed=embed[None])
    dropped = text(**captions(), keep=NO)
    torch.testing.assert_close(dropped.context[:1], empty.context)
    torch.testing.assert_close(dropped.pooled[:1], empty.pooled)
    assert (
        not {"encoder.null_states", "encoder.null_text_embed"}
        & dict(text.named_parameters()).keys()
    )
    assert "encoder.null_states" in text.state_dict()
    with pytest.raises(ValueError, match="null: empty"):
        TextContext(STATES, **WIDTHS).set_null(states, embed)
