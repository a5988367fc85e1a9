#!/usr/bin/env python3
"""Prints the golden values of vision/src/resnet.rs: torchvision's ResNet-50 up to its last stage, on weights that both
sides can make. Needs torch and torchvision.

    python3 scripts/golden_resnet.py
"""

import torch
from torchvision.models import resnet50


def made(name, shape):
    start = sum(name.encode())
    places = torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float64)
    wave = (places * places * 0.7).sin().view(shape)
    if len(shape) == 4:
        values = wave * (4.0 / (shape[1] * shape[2] * shape[3])) ** 0.5
    elif name.endswith((".weight", ".running_var")):
        values = wave * 0.3 + 1.0
    else:
        values = wave * 0.1
    return values.float()


def main():
    network = resnet50(weights=None).eval()
    state = {
        name: made(name, tuple(tensor.shape)) if tensor.is_floating_point() else tensor
        for name, tensor in network.state_dict().items()
    }
    network.load_state_dict(state)
    trunk = torch.nn.Sequential(*list(network.children())[:-2])

    i = torch.arange(2 * 3 * 64 * 96)
    pictures = ((i * i * 7 + i // 5) % 256).float().view(2, 3, 64, 96) / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    with torch.no_grad():
        features = trunk((pictures - mean) / deviation)
    places = [(0, 0, 0, 0), (0, 700, 1, 2), (1, 1301, 0, 2), (1, 2046, 1, 0)]
    print("features:", {place: features[place].item() for place in places})
    print("sum:", features.sum(dtype=torch.float64).item())


if __name__ == "__main__":
    main()
