"""Where texts are written, and in which number format: the device and the data type of an explainer that is loaded."""

import logging
import re

import torch

from gavamoe.config.schema import RuntimeConfig
from gavamoe.errors import InputError
from gavamoe.runtime.connection import cluster_address

_log = logging.getLogger(__name__)
_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")


def writing_device(asked: str | None, *, gpu: bool) -> str:
    """The torch device to write on: `asked`, or else a GPU, if the run trains on one (`gpu`) and one is here; that none
    is here is said, for a large model takes hours on a CPU.

    Raises:
        InputError: no such device here.
    """
    if asked is None:
        seen = torch.cuda.is_available()
        if gpu and not seen:
            _log.warning(
                "the run trains on GPUs, and torch sees none here: texts are written on the CPU (--device cpu says so"
                " without this line; RAY_ADDRESS or --workers N has a cluster's GPUs write)"
            )
        return "cuda" if gpu and seen else "cpu"
    if not _DEVICE.fullmatch(asked):
        raise InputError(f"--device {asked}: expected cpu, cuda or cuda:N")
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked != "cpu" and int(asked.partition(":")[2] or 0) >= here:
        raise InputError(f"--device {asked}: torch sees {here} GPU(s) here; use cpu, or a machine that has it")
    return asked


def writing_workers(placement: RuntimeConfig, asked: int | None, device: str | None) -> int:
    """How many Ray workers write texts; 0: this process does.

    What was `asked`; else as many as trained, where they were on other machines (RAY_ADDRESS), whose memory and GPUs
    the driver's machine need not have.

    Raises:
        InputError: workers and a device are asked for: each worker has the one that the run's `runtime` says.
    """
    if device is not None:
        if asked:
            raise InputError(
                f"--device {device}: with --workers each has what the run's runtime.gpu says; leave it out"
            )
        return 0
    if asked is not None:
        return asked
    return placement.workers if cluster_address() is not None else 0


def writing_dtype(dtype: str, device: str) -> torch.dtype:
    """The data type of an explainer's weights: `dtype` by name, or for "auto" bfloat16 on a GPU and float32 elsewhere.

    A GPU multiplies bfloat16 some ten times as fast as float32 and reads half the bytes; routers and the tables of
    users and items stay float32 (`GavamoeForCausalLM`).
    """
    if dtype == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    named: torch.dtype = getattr(torch, dtype)
    return named
