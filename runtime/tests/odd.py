"""Makes `odd.pt` for the tests of `runtime/src/torch_file.rs`. Needs torch and numpy."""

import argparse
from pathlib import Path

import numpy as np
import torch


class Callback:
    """Stands for what Lightning keeps beside the weights."""

    def __init__(self):
        self.best = torch.zeros(2)


def odd():
    """Every kind of tensor that the reader of torch files knows."""
    grid = torch.arange(12.0).reshape(3, 4) / 7
    tensors = {
        "float": grid, "half": grid.half(), "bfloat": grid.bfloat16(), "double": grid.double(), "long": grid.long(),
        "transposed": grid.t(), "part": grid[1:, 2:], "scalar": grid[2, 3], "empty": grid[:0],
        "channels_last": grid.reshape(1, 2, 2, 3).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(grid), "complex": torch.zeros(2, dtype=torch.complex64),
        "epoch": 3, "name": "odd",
    }
    checkpoint = {"callbacks": {Callback: Callback()}, "hyper_parameters": argparse.Namespace(lr=1e-3, big=2**70),
                  "state_dict": tensors, "seen": {1, 2}, "state": np.random.RandomState(1).get_state()}
    torch.save(checkpoint, Path(__file__).parent / "odd.pt")


odd()
