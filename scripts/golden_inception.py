#!/usr/bin/env python3
"""Prints the golden values of vqgan/src/fidelity/inception.rs: torchvision's InceptionV3 with the pools that FID's has
(Heusel et al. 2017; the differences are those that pytorch-fid documents), on weights that both sides can make. Needs
torch and torchvision.

    python3 scripts/golden_inception.py
"""

import torch
import torch.nn.functional as F
from torchvision.models import inception


def mean_pool(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class A(inception.InceptionA):
    def _forward(self, x):
        return [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(mean_pool(x)),
        ]


class C(inception.InceptionC):
    def _forward(self, x):
        double = self.branch7x7dbl_2(self.branch7x7dbl_1(x))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(self.branch7x7dbl_3(double)))
        return [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            double,
            self.branch_pool(mean_pool(x)),
        ]


class E(inception.InceptionE):
    pool = staticmethod(mean_pool)

    def _forward(self, x):
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [
            self.branch1x1(x),
            torch.cat([self.branch3x3_2a(single), self.branch3x3_2b(single)], 1),
            torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], 1),
            self.branch_pool(self.pool(x)),
        ]


class LastE(E):
    pool = staticmethod(lambda x: F.max_pool2d(x, 3, 1, 1))


def made(name, shape):
    start = sum(name.encode())
    places = torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float64)
    wave = (places * places * 0.7).sin().view(shape)
    if len(shape) == 4:
        values = wave * (6.0 / (shape[1] * shape[2] * shape[3])) ** 0.5
    elif name.endswith((".weight", ".running_var")):
        values = wave * 0.3 + 1.0
    else:
        values = wave * 0.1
    return values.float()


def main():
    network = inception.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    network.Mixed_5b, network.Mixed_5c, network.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
    network.Mixed_6b, network.Mixed_6c = C(768, 128), C(768, 160)
    network.Mixed_6d, network.Mixed_6e = C(768, 160), C(768, 192)
    network.Mixed_7b, network.Mixed_7c = E(1280), LastE(2048)
    network.fc, network.dropout = torch.nn.Identity(), torch.nn.Identity()
    network.eval()
    state = network.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            state[name] = made(name, tuple(tensor.shape))
    network.load_state_dict(state)

    i = torch.arange(2 * 3 * 40 * 48)
    pictures = ((i * i * 7 + i // 5) % 256).float().view(2, 3, 40, 48) / 255
    with torch.no_grad():
        x = F.interpolate(pictures, size=(299, 299), mode="bilinear", align_corners=False)
        features = network(2 * x - 1)
    print("features:", {place: features[place].item() for place in [(0, 0), (0, 700), (1, 1300), (1, 2047)]})
    print("sum:", features.sum(dtype=torch.float64).item())


if __name__ == "__main__":
    main()
