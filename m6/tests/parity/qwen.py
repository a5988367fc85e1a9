"""Qwen's forward pass in plain torch, written from its description: its own names of weights and settings, positions beyond
the trained length by dynamic NTK, queries scaled by LogN.

Legend: n tokens, h heads, k head width.
"""

import math

import torch

# As `configuration_qwen.py` has them; texts of the golden are longer than `seq_length`.
CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "torch_dtype": "float32",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 8,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 64,
    "seq_length": 10,
    "rotary_emb_base": 10000.0,
    "rotary_pct": 1.0,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
}


def shapes(config):
    """Names and shapes of all weights."""
    d, hidden = config["hidden_size"], config["intermediate_size"] // 2
    width = config["num_attention_heads"] * config["kv_channels"]
    yield "transformer.wte.weight", (config["vocab_size"], d)
    for layer in range(config["num_hidden_layers"]):
        stem = f"transformer.h.{layer}"
        yield f"{stem}.ln_1.weight", (d,)
        yield f"{stem}.attn.c_attn.weight", (3 * width, d)
        yield f"{stem}.attn.c_attn.bias", (3 * width,)
        yield f"{stem}.attn.c_proj.weight", (d, width)
        yield f"{stem}.ln_2.weight", (d,)
        yield f"{stem}.mlp.w1.weight", (hidden, d)
        yield f"{stem}.mlp.w2.weight", (hidden, d)
        yield f"{stem}.mlp.c_proj.weight", (d, hidden)
    yield "transformer.ln_f.weight", (d,)
    yield "lm_head.weight", (config["vocab_size"], d)


def random_weights(config, seed, spread):
    """Weights far from the start of training, where nothing would show."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name, shape):
        values = torch.randn(shape, generator=generator) * spread
        return (values + 1.0 if ".ln_" in name else values).requires_grad_()

    return {name: draw(name, shape) for name, shape in shapes(config)}


def norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotated(x_nhk, base):
    """Each head's first half and second half, turned as pairs."""
    n, _, k = x_nhk.shape
    frequencies = base ** -(torch.arange(0, k, 2, dtype=torch.float32) / k)
    angles = torch.arange(n, dtype=torch.float32)[:, None, None] * frequencies
    first, second = x_nhk[..., : k // 2], x_nhk[..., k // 2 :]
    cosines, sines = angles.cos(), angles.sin()
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)


def logits(weights, config, ids):
    """`[n, vocabulary]` of one text."""
    n, heads, k = len(ids), config["num_attention_heads"], config["kv_channels"]
    eps, trained = config["layer_norm_epsilon"], config["seq_length"]
    alpha = 1.0
    if config["use_dynamic_ntk"]:
        alpha = max(2.0 ** math.ceil(math.log2(n / trained) + 1) - 1, 1.0)
    base = config["rotary_emb_base"] * alpha ** (k / (k - 2))
    scale = torch.ones(n)
    if config["use_logn_attn"]:
        places = torch.arange(1, n + 1, dtype=torch.float64)
        scale = (places.log() / math.log(trained)).clamp_min(1.0).float()
    unseen = torch.ones(n, n, dtype=torch.bool).triu(1)
    x = weights["transformer.wte.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        stem = f"transformer.h.{layer}"
        weight = lambda name: weights[f"{stem}.{name}"]
        normed = norm(x, weight("ln_1.weight"), eps)
        qkv = normed @ weight("attn.c_attn.weight").T + weight("attn.c_attn.bias")
        q, key, value = (part.reshape(n, heads, k) for part in qkv.chunk(3, dim=-1))
        q, key = rotated(q, base) * scale[:, None, None], rotated(key, base)
        scores = torch.einsum("nhk,mhk->hnm", q, key) / math.sqrt(k)
        attended = scores.masked_fill(unseen, -math.inf).softmax(-1)
        x = x + torch.einsum("hnm,mhk->nhk", attended, value).reshape(n, -1) @ weight("attn.c_proj.weight").T
        normed = norm(x, weight("ln_2.weight"), eps)
        gated = (normed @ weight("mlp.w1.weight").T) * torch.nn.functional.silu(normed @ weight("mlp.w2.weight").T)
        x = x + gated @ weight("mlp.c_proj.weight").T
    return norm(x, weights["transformer.ln_f.weight"], eps) @ weights["lm_head.weight"].T


def golden(seed, spread, tokens):
    """Weights, and what is to come of them: ids, logits, the loss and its gradients."""
    weights = random_weights(CONFIG, seed, spread)
    ids = torch.randint(CONFIG["vocab_size"], (tokens,), generator=torch.Generator().manual_seed(seed))
    made = logits(weights, CONFIG, ids)
    loss = torch.nn.functional.cross_entropy(made[:-1], ids[1:])
    loss.backward()
    expected = {"ids": ids, "logits": made.detach(), "loss": loss.detach()}
    expected |= {f"grad.{name}": weight.grad for name, weight in weights.items()}
    return {name: weight.detach() for name, weight in weights.items()}, expected
