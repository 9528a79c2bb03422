"""Whether a base model's weights are whole: all that its config asks for, no others, of the right shapes, finite.

transformers draws what is missing anew, passes over what it does not know, and reads NaN as any other number.
`check_weights` finds that out without the memory that the model takes; `check_loaded` judges a loaded model.
"""

import mmap
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from gavamoe.artifacts.files import read_json
from gavamoe.errors import InputError

_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Names of weights in a model folder, in the order in which transformers looks for them."""
_ADAPTER = "base_model.model."
"""How the names of weights begin that were saved from inside a PEFT wrapper."""
_GGUF_STRING, _GGUF_ARRAY = 8, 9
"""Numbers of GGUF's types that are no scalars."""
_MOST_GGUF_VALUES = 4_000_000
"""Values in a GGUF file's arrays at most; its reader makes an object of each. The largest vocabularies have
1.3 million, with their types, scores and merges."""


def check_weights(base_model: str, source: str, options: Mapping[str, Any], config: PreTrainedConfig) -> None:
    """Check the weights at `source` against `config`; every number is read, tensor by tensor, none is kept.

    A GGUF file's quantized numbers are left to `check_loaded`: unpacking them takes minutes.

    Args:
        base_model: the model's name in errors.
        source, options: arguments of `from_pretrained`, see `base_model.locate_base`.

    Raises:
        InputError: weights are missing, unknown, of another shape, or not finite.
        OSError, ValueError, RuntimeError, SafetensorError: a file can't be read.
    """
    if "gguf_file" in options:
        tensors = _check_gguf_names(base_model, Path(source) / options["gguf_file"], config)
    else:
        with _quiet():
            _, loading = AutoModelForCausalLM.from_pretrained(
                source, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        check_names(base_model, loading)
        tensors = _read_tensors(Path(cached_file(source, "config.json")).parent)
    check_finite(base_model, tensors)


def check_loaded(base_model: str, model: PreTrainedModel, loading: Mapping[str, Any]) -> None:
    """Check a loaded model, and what `from_pretrained` says about its weights (`output_loading_info`).

    Raises:
        InputError: weights were missing, unknown, of another shape, or are not finite.
    """
    check_names(base_model, loading)
    check_finite(base_model, ((name, parameter.detach()) for name, parameter in model.named_parameters()))


def check_names(base_model: str, loading: Mapping[str, Any]) -> None:
    """Refuse weights that are missing, unknown or of another shape, by what `output_loading_info` tells.

    An output head that is tied to the embeddings, and so is not stored, does not count as missing.
    """
    missing, unknown = loading["missing_keys"], loading["unexpected_keys"]
    found = []
    if missing:
        found.append(f"{_count(missing)} missing, such as {_first(missing)}")
    if unknown:
        found.append(f"{_count(unknown)} unknown, such as {_first(unknown)}")
    if found:
        way_out = "save the whole model again (save_pretrained)"
        if _first(unknown or [""]).startswith(_ADAPTER):
            way_out = f"they were saved inside a PEFT wrapper: save model.merge_and_unload() of {_ADAPTER}* again"
        raise InputError(f"base_model {base_model}: {'; '.join(found)}; {way_out}")
    if loading["mismatched_keys"]:
        name, stored, wanted = min(loading["mismatched_keys"])
        raise InputError(
            f"base_model {base_model}: {_count(loading['mismatched_keys'])} of another shape than config.json says,"
            f" such as {name}: {tuple(stored)}, not {tuple(wanted)}; give the config.json of these weights, or save the"
            " model again (save_pretrained)"
        )


def check_finite(base_model: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights that hold NaN or infinity."""
    bad = [name for name, tensor in tensors if not _finite(tensor)]
    if bad:
        raise InputError(
            f"base_model {base_model}: {_count(bad)} not finite (NaN or infinity), such as {_first(bad)}; training can"
            " only spread that: take a checkpoint from before the model diverged"
        )


def check_gguf_header(path: Path) -> None:
    """Check that what a GGUF file says of itself lies within it, before a library believes it.

    The reader of the package gguf goes on past the end of the file for as many values as an array claims to have, which
    takes all memory.

    Raises:
        ValueError: no GGUF file of version 2 or 3, a value beyond the end, an unknown type, or more than any model has.
        OSError: the file can't be read.
    """
    size = path.stat().st_size
    if size < 24:
        raise ValueError("it has no header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        order = "<" if struct.unpack_from("<I", data, 4)[0] & 0xFFFF else ">"
        version, tensors, fields = struct.unpack_from(f"{order}IQQ", data, 4)
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; 2 and 3 can be read")
        header = _GGUFHeader(data, size, order)
        for _ in range(fields):
            header.string()
            header.value(header.number("I"))
        for _ in range(tensors):
            header.string()
            header.skip(8 * header.number("I") + 4 + 8)  # sizes, type, offset


class _GGUFHeader:
    """A walk through a GGUF file's fields that never leaves the file."""

    def __init__(self, data: mmap.mmap, size: int, order: str) -> None:
        from gguf import GGUFReader

        scalars: dict[Any, Any] = GGUFReader.gguf_scalar_to_np
        self._sizes = {int(kind): np.dtype(scalar).itemsize for kind, scalar in scalars.items()}
        self._data, self._size, self._at, self._values = data, size, 24, 0
        self._formats = {kind: struct.Struct(order + kind) for kind in "IQ"}

    def skip(self, count: int) -> None:
        if count > self._size - self._at:
            raise ValueError(f"what begins at byte {self._at:,} goes on beyond its end")
        self._at += count

    def number(self, kind: str) -> int:
        """An unsigned integer of 4 (I) or 8 (Q) bytes."""
        at = self._at
        self.skip(self._formats[kind].size)
        value: int = self._formats[kind].unpack_from(self._data, at)[0]
        return value

    def string(self) -> None:
        self.skip(self.number("Q"))

    def value(self, kind: int) -> None:
        if kind in self._sizes:
            self.skip(self._sizes[kind])
        elif kind == _GGUF_STRING:
            self.string()
        elif kind == _GGUF_ARRAY:
            self._array()
        else:
            raise ValueError(f"unknown type {kind} before byte {self._at:,}")

    def _array(self) -> None:
        kind, count = self.number("I"), self.number("Q")
        self._values += count
        if self._values > _MOST_GGUF_VALUES:
            raise ValueError(f"arrays of {self._values:,} values; {_MOST_GGUF_VALUES:,} at most")
        if kind in self._sizes:
            self.skip(self._sizes[kind] * count)
        elif kind == _GGUF_STRING:
            for _ in range(count):
                self.string()
        else:  # arrays of arrays are in the format, but in no model's file
            raise ValueError(f"an array of type {kind} before byte {self._at:,}")


def damaged_file(folder: Path) -> str | None:
    """The first file of weights in a model folder that can't even be opened, by name; None where there is none."""
    try:
        paths = [path for path in _weight_files(folder) if path.is_file()]
    except (InputError, AttributeError, KeyError, TypeError):
        return f"the index of the weights in {folder.name}"
    return next((path.name for path in paths if not _opens(path)), None)


def _opens(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return is_zipfile(path)
    try:
        with safe_open(str(path), framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:
        tensor = tensor.float()  # the 8-bit formats have no extremes
    return all(bool(torch.isfinite(extreme)) for extreme in tensor.aminmax())


def _count(names: Collection[Any]) -> str:
    return "1 weight is" if len(names) == 1 else f"{len(names)} weights are"


def _first(names: Iterable[str]) -> str:
    """The first name of a layer, which tells more than that of a head; else the first of all."""
    ordered = sorted(names)
    return next((name for name in ordered if ".0." in name), ordered[0])


def _read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights in a model folder, one at a time."""
    for path in _weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118  (no mapping)
                    yield name, stored.get_tensor(name)
        else:
            # Mapped, a pickled checkpoint stays on disk; those of torch before 1.6 can't be.
            yield from torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path)).items()


def _weight_files(folder: Path) -> list[Path]:
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        return []  # under another name that transformers knows: `check_loaded` will see the numbers
    if path.suffix != ".json":
        return [path]
    return [folder / name for name in sorted(set(read_json(path)["weight_map"].values()))]


def _check_gguf_names(base_model: str, path: Path, config: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """Check names and sizes of a GGUF file's tensors; returns those that are not quantized."""
    from gguf import GGMLQuantizationType, GGUFReader
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    processor = TENSOR_PROCESSORS.get(config.model_type, TensorProcessor)(config=config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    if config.tie_word_embeddings:
        names.pop("output.weight", None)
    mismatched = {
        (name, tuple(int(size) for size in reversed(stored[name].shape)), tuple(shapes[names[name]]))
        for name in names.keys() & stored.keys()
        # llama.cpp stores some matrices turned: only the numbers of rows and columns are compared.
        if names[name] in shapes and sorted(stored[name].shape) != sorted(shapes[names[name]])
    }
    # What llama.cpp adds, such as rope_freqs.weight, is not a weight here: nothing counts as unknown.
    check_names(
        base_model,
        {"missing_keys": names.keys() - stored.keys(), "unexpected_keys": set(), "mismatched_keys": mismatched},
    )
    plain = {GGMLQuantizationType.F32, GGMLQuantizationType.F16}
    return (
        (name, torch.from_numpy(tensor.data.copy())) for name, tensor in stored.items() if tensor.tensor_type in plain
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no report of transformers' about weights: the error says it."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
