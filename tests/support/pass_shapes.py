"""Inputs of forward passes, by shape alone."""

import torch

from serving.engine.passes.strategy import PassInput


def shaped(first_slot: int, num_rows: int, num_tokens: int) -> PassInput:
    """A pass of so many tokens for so many slots; what it says is of no account."""
    zeros_BT = torch.zeros((num_rows, num_tokens), dtype=torch.int64)
    return PassInput(zeros_BT, zeros_BT, 1, first_slot, 0)
