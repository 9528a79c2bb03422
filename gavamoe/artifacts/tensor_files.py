"""Files of torch, read as tensors and plain values only: nothing in a stranger's checkpoint runs."""

import pickle
from pathlib import Path
from typing import Any

import torch

from gavamoe.errors import InputError, one_line


def load_tensors(path: Path, device: str | torch.device = "cpu") -> Any:
    """What `torch.save` wrote, onto a device.

    Raises:
        InputError: the file is damaged, or holds anything but tensors and plain values.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise not_only_tensors(path, error) from error
    except (EOFError, RuntimeError) as error:
        raise InputError(f"{path}: not a readable file of torch ({one_line(error)})") from error


def not_only_tensors(path: Path, error: Exception) -> InputError:
    """The error for a file or folder that holds something else."""
    reason = one_line(error).partition("Please file")[0].partition("In PyTorch")[0]
    return InputError(
        f"{path}: holds more than tensors and plain values, so it is not what gavamoe wrote; nothing in it was run"
        f" ({reason.strip()})"
    )
