#!/usr/bin/env python3
"""Prints the golden value of `MsSsim` in vqgan/src/metrics.rs, by pytorch-msssim 1.0 in float64.

    python3 scripts/golden_ms_ssim.py
"""

import torch
from pytorch_msssim import ms_ssim

HEIGHT, WIDTH = 176, 192


def picture(byte):
    values = [byte(i) % 256 for i in range(3 * HEIGHT * WIDTH)]
    return torch.tensor(values, dtype=torch.float64).view(1, 3, HEIGHT, WIDTH) / 255


x = picture(lambda i: i // 5 * 7 % 256)
y = picture(lambda i: (i // 5 * 7 % 256 * 3 + i * i % 31 * 8) // 4)
print(ms_ssim(x, y, data_range=1.0).item())
