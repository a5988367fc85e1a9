#!/usr/bin/env python3
"""Prints the golden values of vqgan/src/lpips.rs: LPIPS (Zhang et al. 2018) by its published steps, in float32, on
torchvision's VGG-16 with weights that both sides can make. Needs torch and torchvision.

    python3 scripts/golden_lpips.py
"""

import torch
from torchvision.models import vgg16

TAPS = [3, 8, 15, 22, 29]
SHIFT = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
SCALE = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)


def wave(start, shape):
    count = torch.Size(shape).numel()
    return (torch.arange(start, start + count, dtype=torch.float64) * 0.7).sin().float().view(shape)


def normalized(x):
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


def main():
    features = vgg16(weights=None).features.eval()
    for place, layer in enumerate(features):
        if isinstance(layer, torch.nn.Conv2d):
            bound = (6.0 / (9.0 * layer.in_channels)) ** 0.5
            layer.weight.data = wave(place, layer.weight.shape) * bound
            layer.bias.data = wave(place + 1, layer.bias.shape) * 0.1
    heads = [wave(k, (1, c, 1, 1)).abs() / c for k, c in enumerate([64, 128, 256, 512, 512])]

    def activations(x):
        x, found = (x - SHIFT) / SCALE, []
        for place, layer in enumerate(features):
            x = layer(x)
            if place in TAPS:
                found.append(normalized(x))
        return found

    def distance(x, y):
        pairs = zip(activations(x), activations(y), heads)
        return sum(torch.nn.functional.conv2d((a - b) ** 2, head).mean([1, 2, 3]) for a, b, head in pairs)

    x, y = wave(5, (2, 3, 32, 32)), (wave(900, (2, 3, 32, 32)) * 0.5).requires_grad_()
    each = distance(x, y)
    each.mean().backward()
    print("distances:", each.tolist())
    print("sum of the absolute gradient:", y.grad.abs().sum(dtype=torch.float64).item())


if __name__ == "__main__":
    main()
