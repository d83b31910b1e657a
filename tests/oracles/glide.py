"""GLIDE's base model by the names of its published file, slowly and in the type of its weights.

`w` is the file: tensors by name. All heads have 64 channels. Written down from the paper (Nichol et
al. 2021, section 2.1 and appendix) and from the names and shapes.
"""

import math

import torch
import torch.nn.functional as F

HEAD = 64
START = 0.008


def random_weights(
    make, width=64, mults=(1, 2), depth=1, attended=(False, True), xf=64, layers=2, length=8, n=300
):
    """The file of a model of any size, its tensors made by `make(shape, name)`.

    Args:
        make: called with a shape and a name.
        width, mults, depth: channels, their multiples by level, residual blocks per level.
        attended: which levels have attention.
        xf, layers, length, n: width, depth and positions of the text encoder, tokens.
    """
    w = {}

    def layer(name, *shape):
        w[f"{name}.weight"] = make(shape, f"{name}.weight")
        w[f"{name}.bias"] = make(shape[:1], f"{name}.bias")

    def res(name, before, after):
        layer(f"{name}.in_layers.0", before)
        layer(f"{name}.in_layers.2", after, before, 3, 3)
        layer(f"{name}.emb_layers.1", 2 * after, 4 * width)
        layer(f"{name}.out_layers.0", after)
        layer(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            layer(f"{name}.skip_connection", after, before, 1, 1)

    def attention(name, channels):
        layer(f"{name}.norm", channels)
        layer(f"{name}.qkv", 3 * channels, channels, 1)
        layer(f"{name}.encoder_kv", 2 * channels, xf, 1)
        layer(f"{name}.proj_out", channels, channels, 1)

    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        layer(f"{block}.attn.c_qkv", 3 * xf, xf)
        layer(f"{block}.attn.c_proj", xf, xf)
        layer(f"{block}.mlp.c_fc", 4 * xf, xf)
        layer(f"{block}.mlp.c_proj", xf, 4 * xf)
        layer(f"{block}.ln_1", xf)
        layer(f"{block}.ln_2", xf)
    layer("final_ln", xf)
    layer("transformer_proj", 4 * width, xf)
    for name, count in {"token_embedding.weight": n, "positional_embedding": length}.items():
        w[name] = make((count, xf), name)
    w["padding_embedding"] = make((length, xf), "padding_embedding")
    layer("time_embed.0", 4 * width, width)
    layer("time_embed.2", 4 * width, 4 * width)
    layer("input_blocks.0.0", width, 3, 3, 3)
    channels, now, index = [width], width, 1
    for level, mult in enumerate(mults):
        for _ in range(depth):
            res(f"input_blocks.{index}.0", now, mult * width)
            now, index = mult * width, index + 1
            if attended[level]:
                attention(f"input_blocks.{index - 1}.1", now)
            channels.append(now)
        if level < len(mults) - 1:
            res(f"input_blocks.{index}.0", now, now)
            index += 1
            channels.append(now)
    res("middle_block.0", now, now)
    attention("middle_block.1", now)
    res("middle_block.2", now, now)
    index = 0
    for level, mult in reversed(list(enumerate(mults))):
        for i in range(depth + 1):
            res(f"output_blocks.{index}.0", now + channels.pop(), mult * width)
            now, part = mult * width, 1
            if attended[level]:
                attention(f"output_blocks.{index}.1", now)
                part = 2
            if level and i == depth:
                res(f"output_blocks.{index}.{part}", now, now)
            index += 1
    layer("out.0", width)
    layer("out.2", 6, width, 3, 3)
    return w


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(w, name, x):
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(q, k, v):
    """(B, heads, T, 64) and twice (B, heads, S, 64) -> (B, heads, T, 64)."""
    return (q @ k.transpose(-1, -2) / math.sqrt(HEAD)).softmax(-1) @ v


def encode_text(w, tokens, mask):
    """Tokens (B, L) and where they are the caption's -> states (B, L, xf)."""
    x = w["token_embedding.weight"][tokens] + w["positional_embedding"]
    x = torch.where(mask[..., None], x, w["padding_embedding"])
    i = 0
    while f"transformer.resblocks.{i}.ln_1.weight" in w:
        block = f"transformer.resblocks.{i}"
        qkv = linear(w, f"{block}.attn.c_qkv", layer_norm(w, f"{block}.ln_1", x))
        q, k, v = qkv.unflatten(-1, (-1, 3 * HEAD)).transpose(1, 2).split(HEAD, -1)
        joined = attend(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(w, f"{block}.attn.c_proj", joined)
        h = linear(w, f"{block}.mlp.c_fc", layer_norm(w, f"{block}.ln_2", x))
        x = x + linear(w, f"{block}.mlp.c_proj", h * (1 + torch.erf(h / math.sqrt(2))) / 2)
        i += 1
    return layer_norm(w, "final_ln", x)


def group_norm(w, name, x):
    groups = x.unflatten(1, (32, -1)).flatten(2)
    centred = groups - groups.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    weight, bias = (w[f"{name}.{kind}"][:, None, None] for kind in ("weight", "bias"))
    return scaled.reshape(x.shape) * weight + bias


def convolve(w, name, x):
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)


def res_block(w, name, x, emb, resample):
    h = F.silu(group_norm(w, f"{name}.in_layers.0", x))
    if resample == "down":
        h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
    elif resample == "up":
        h, x = (each.repeat_interleave(2, 2).repeat_interleave(2, 3) for each in (h, x))
    h = convolve(w, f"{name}.in_layers.2", h)
    scale, shift = linear(w, f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None].chunk(2, 1)
    h = F.silu(group_norm(w, f"{name}.out_layers.0", h) * (1 + scale) + shift)
    h = convolve(w, f"{name}.out_layers.3", h)
    if f"{name}.skip_connection.weight" in w:
        x = convolve(w, f"{name}.skip_connection", x)
    return x + h


def attention_block(w, name, x, states):
    pixels = group_norm(w, f"{name}.norm", x).flatten(2).transpose(1, 2)
    own = pixels @ w[f"{name}.qkv.weight"][..., 0].T + w[f"{name}.qkv.bias"]
    text = states @ w[f"{name}.encoder_kv.weight"][..., 0].T + w[f"{name}.encoder_kv.bias"]
    q, k, v = own.unflatten(-1, (-1, 3 * HEAD)).transpose(1, 2).split(HEAD, -1)
    text_k, text_v = text.unflatten(-1, (-1, 2 * HEAD)).transpose(1, 2).split(HEAD, -1)
    h = attend(q, torch.cat([text_k, k], 2), torch.cat([text_v, v], 2))
    h = h.transpose(1, 2).flatten(2) @ w[f"{name}.proj_out.weight"][..., 0].T
    return x + (h + w[f"{name}.proj_out.bias"]).transpose(1, 2).reshape(x.shape)


def block(w, name, x, emb, states, resample=None):
    """The parts of one block in turn; the last residual block may change the size."""
    parts = sorted({key.split(".")[2] for key in w if key.startswith(f"{name}.")})
    for part in parts:
        if f"{name}.{part}.qkv.weight" in w:
            x = attention_block(w, f"{name}.{part}", x, states)
        else:
            changes = resample if part == parts[-1] else None
            x = res_block(w, f"{name}.{part}", x, emb, changes)
    return x


def predict(w, x, t, tokens, mask, depth=1):
    """Noised pictures (B, 3, 64, 64) at timesteps (B,) -> (B, 6, 64, 64), noise and variance."""
    width = w["time_embed.0.weight"].shape[1]
    frequencies = 10000 ** (-torch.arange(width // 2).to(x) / (width // 2))
    angles = t[:, None].to(x) * frequencies
    emb = torch.cat([angles.cos(), angles.sin()], 1)
    emb = linear(w, "time_embed.2", F.silu(linear(w, "time_embed.0", emb)))
    states = encode_text(w, tokens, mask)
    emb = emb + linear(w, "transformer_proj", states[:, -1])
    skips, i = [convolve(w, "input_blocks.0.0", x)], 1
    while f"input_blocks.{i}.0.in_layers.0.weight" in w:
        down = "down" if i % (depth + 1) == 0 else None
        skips.append(block(w, f"input_blocks.{i}", skips[-1], emb, states, down))
        i += 1
    x, i = skips[-1], 0
    for part in range(3):  # written out, since its parts are not in one block
        name = f"middle_block.{part}"
        x = attention_block(w, name, x, states) if part == 1 else res_block(w, name, x, emb, None)
    while skips:
        rises = (i + 1) % (depth + 1) == 0 and len(skips) > 1
        x = torch.cat([x, skips.pop()], 1)
        x = block(w, f"output_blocks.{i}", x, emb, states, "up" if rises else None)
        i += 1
    return convolve(w, "out.2", F.silu(group_norm(w, "out.0", x)))


def draw(w, tokens, mask, padding, noise, steps, guidance, depth=1):
    """DDPM in `steps` of 1000 with guidance, pictures (B, 3, 64, 64) kept in [-1, 1].

    Args:
        tokens, mask: the captions, (B, L).
        padding: the id that fills captions up; a caption of it only is the empty one.
        noise: called without arguments, (B, 3, 64, 64).
    """
    angle = lambda i: (i / 1000 + START) / (1 + START) * math.pi / 2
    bar = 1.0
    bars = []
    for i in range(1000):
        beta = min(1 - math.cos(angle(i + 1)) ** 2 / math.cos(angle(i)) ** 2, 0.999)
        bar *= 1 - beta
        bars.append(bar)
    places = [round(i * 999 / (steps - 1)) for i in range(steps)]
    x = noise().double()
    both = torch.cat([tokens, torch.full_like(tokens, padding)])
    masks = torch.cat([mask, torch.zeros_like(mask)])
    for i in reversed(range(steps)):
        now, before = bars[places[i]], bars[places[i - 1]] if i else 1.0
        beta = 1 - now / before
        t = torch.full((2 * len(x),), places[i])
        out = predict(w, torch.cat([x, x]), t, both, masks, depth)
        with_caption, without = out[:, :3].chunk(2)
        eps = without + guidance * (with_caption - without)
        share = (out[: len(x), 3:] + 1) / 2
        x0 = ((x - math.sqrt(1 - now) * eps) / math.sqrt(now)).clamp(-1, 1)
        mean = math.sqrt(before) * beta / (1 - now) * x0
        mean = mean + math.sqrt(1 - beta) * (1 - before) / (1 - now) * x
        if i == 0:
            return mean
        smallest = beta * (1 - before) / (1 - now)
        log_variance = share * math.log(beta) + (1 - share) * math.log(smallest)
        x = mean + (log_variance / 2).exp() * noise()
