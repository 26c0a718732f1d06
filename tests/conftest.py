"""Tests compute on one thread: on nets this small, a second one mostly waits for the first."""

import torch

torch.set_num_threads(1)
