"""Tests run on one torch thread: at these sizes two are several times slower."""

import torch

pytest_plugins = ["pytester"]

torch.set_num_threads(1)
