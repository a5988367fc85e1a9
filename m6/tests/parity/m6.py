#!/usr/bin/env python3
"""M6's stack in torch's own encoder layers, written from its description: layer norms before attention and feed-forward,
GELU, biases, learned positions and segments, linear patches, and one stack whose prefixes are seen whole.

    python3 m6/tests/parity/m6.py m6/tests/parity/m6.safetensors

Writes random weights under our names, and the loss of a caption and a drawing with its gradient for every weight, in
float32 on the CPU, for `m6/src/train/loss.rs`. Needs torch and safetensors.
"""

import sys

import torch
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

WIDTH, HEADS, HIDDEN, LAYERS, NORM_EPS = 16, 2, 24, 3, 1e-6
TEXT, CODES = 20, 4
# Special ids, behind those of texts.
CHINESE, END_OF_TEXT, BEGIN_OF_IMAGE = TEXT + 3, TEXT + 4, TEXT + 5
FIRST_CODE, END_OF_IMAGE = TEXT + 6, CODES
# Rows of the position table: a text's places, none, rows and columns of patches, rows and columns of codes.
MAX_TEXT, GRID = 8, 2
NONE, PATCH_ROW, CODE_ROW = MAX_TEXT, MAX_TEXT + 1, MAX_TEXT + 1 + 2 * GRID
POSITIONS = CODE_ROW + 2 * GRID
PREFIX_TEXT, PATCHES, TARGET_TEXT, CODE = range(4)
SIDE, PATCH = 8, 4
WORDS, DRAWN = [5, 6, 7], [3, 2, 1, 0]
# Ours, and torch's.
LAYER = {
    "attention_norm.weight": "norm1.weight", "attention_norm.bias": "norm1.bias",
    "attention.qkv.weight": "self_attn.in_proj_weight", "attention.qkv.bias": "self_attn.in_proj_bias",
    "attention.out.weight": "self_attn.out_proj.weight", "attention.out.bias": "self_attn.out_proj.bias",
    "feed_forward_norm.weight": "norm2.weight", "feed_forward_norm.bias": "norm2.bias",
    "mlp.up.weight": "linear1.weight", "mlp.up.bias": "linear1.bias",
    "mlp.down.weight": "linear2.weight", "mlp.down.bias": "linear2.bias",
}


def random_weights(layer):
    """Far from the start of training, where nothing would show."""
    shapes = {
        "tokens.weight": (FIRST_CODE + CODES, WIDTH), "positions.weight": (POSITIONS, WIDTH), "segments.weight": (4, WIDTH),
        "patches.project.weight": (WIDTH, 3 * PATCH * PATCH), "patches.project.bias": (WIDTH,),
        "norm.weight": (WIDTH,), "norm.bias": (WIDTH,), "code_head.weight": (CODES + 1, WIDTH),
    }
    of_layer = dict(layer.named_parameters())
    for index in range(LAYERS):
        shapes |= {f"blocks.{index}.{own}": tuple(of_layer[name].shape) for own, name in LAYER.items()}
    generator = torch.Generator().manual_seed(1)
    draw = lambda shape: torch.randn(shape, generator=generator) * 0.3
    weights = {name: draw(shape) + float("norm.weight" in name) for name, shape in shapes.items()}
    return {name: weight.requires_grad_() for name, weight in weights.items()}


def picture():
    """`[3, side, side]`, from about -1 to 1."""
    bytes_hwc = (torch.arange(3 * SIDE * SIDE) * 37 + 11) % 256
    return bytes_hwc.view(SIDE, SIDE, 3).permute(2, 0, 1) / 127.5 - 1


def embedded(weights, tokens):
    """`[n, d]` of (content, two positions, segment) each."""
    content = torch.stack([weights["tokens.weight"][token[0]] if isinstance(token[0], int) else token[0] for token in tokens])
    first, second, segment = (torch.tensor([token[part] for token in tokens]) for part in (1, 2, 3))
    places = weights["positions.weight"]
    return content + places[first] + places[second] + weights["segments.weight"][segment]


def hidden(weights, layer, tokens, prefix):
    """`[n, d]` of an example whose first `prefix` tokens see each other and whose others see those and what is before."""
    n = len(tokens)
    sees = torch.ones(n, n).tril().bool()
    sees[:, :prefix] = True
    sees[:prefix, prefix:] = False
    x = embedded(weights, tokens)[None]
    for index in range(LAYERS):
        mapped = {name: weights[f"blocks.{index}.{own}"] for own, name in LAYER.items()}
        x = functional_call(layer, mapped, (x,), {"src_mask": ~sees})
    return F.layer_norm(x[0], (WIDTH,), weights["norm.weight"], weights["norm.bias"], NORM_EPS)


def write(path):
    """Writes the golden file."""
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, HIDDEN, dropout=0.0, activation="gelu", layer_norm_eps=NORM_EPS, batch_first=True, norm_first=True
    )
    weights = random_weights(layer)
    kernel = weights["patches.project.weight"].view(WIDTH, 3, PATCH, PATCH)
    patches = F.conv2d(picture()[None], kernel, weights["patches.project.bias"], stride=PATCH)[0].flatten(1).T
    at = lambda table, place: (table + place // GRID, table + GRID + place % GRID)

    seen = [(patch, *at(PATCH_ROW, place), PATCHES) for place, patch in enumerate(patches)]
    said = [(token, place, NONE, TARGET_TEXT) for place, token in enumerate([CHINESE, *WORDS])]
    caption = hidden(weights, layer, seen + said, len(seen))[len(seen):]
    text_head = weights["tokens.weight"][:FIRST_CODE]
    text_losses = F.cross_entropy(caption @ text_head.T, torch.tensor([*WORDS, END_OF_TEXT]), reduction="none")

    prompt = [(token, place, NONE, PREFIX_TEXT) for place, token in enumerate(WORDS)]
    begin = [(BEGIN_OF_IMAGE, 0, NONE, CODE)]
    drawn = [(FIRST_CODE + code, *at(CODE_ROW, place), CODE) for place, code in enumerate(DRAWN)]
    drawing = hidden(weights, layer, prompt + begin + drawn, len(prompt))[len(prompt):]
    labels = torch.tensor([*DRAWN, END_OF_IMAGE])
    code_losses = F.cross_entropy(drawing @ weights["code_head.weight"].T, labels, reduction="none")

    loss = text_losses.mean() + code_losses.mean()
    loss.backward()
    golden = {f"weight.{name}": weight.detach() for name, weight in weights.items()}
    golden |= {f"grad.{name}": weight.grad for name, weight in weights.items()}
    golden |= {"loss": loss.detach(), "text_losses": text_losses.detach(), "code_losses": code_losses.detach()}
    save_file({name: tensor.contiguous() for name, tensor in golden.items()}, path)


if __name__ == "__main__":
    write(sys.argv[1])
