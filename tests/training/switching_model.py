"""A module that switches torch's globals when it is imported."""

import torch
from torch import nn

torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)
torch.set_num_threads(torch.get_num_threads() + 1)


class Net(nn.Linear):
    def __init__(self) -> None:
        super().__init__(10, 1)
