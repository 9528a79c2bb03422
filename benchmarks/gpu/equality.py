"""The same numbers as on a CPU: models and gradients, experts without tokens, stage 1, DeepSpeed's stages."""

import copy
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from benchmarks.gpu import Figures, clock, models
from gavamoe.config.files import load_config
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.model.experts import MoeSpec, SwiGluExperts
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.train import train_stage1
from gavamoe.stage2.schedule import PEAK
from gavamoe.stage2.training_engines import Engine, make_engine

LOSS = {"fp32": 1e-4, "bf16": 1e-2}
GRADIENT = {"fp32": 1e-3, "bf16": 0.25}
"""Largest relative error of all gradients together. bfloat16's rounding also moves tokens to other experts."""


def distance(found: Tensor, true: Tensor) -> float:
    """Relative error, by norms; NaN stays NaN."""
    true = true.double().cpu()
    return float((found.double().cpu() - true).norm() / true.norm().clamp(min=1e-30))


def passed(ok: bool) -> str:
    """PASS or FAIL."""
    return "PASS" if ok else "FAIL"


def model(device: str, tiny: bool) -> tuple[str, Figures]:
    """Losses and gradients of tiny explainers, against float64 on the CPU; padding on either side."""
    del tiny
    figures: Figures = {}
    ok = True
    for base in (models.tiny_llama(), models.tiny_gpt2()):
        for conversion in ("dense", "random", "shared"):
            for precision in LOSS:
                loss, gradient = _model_errors(base, conversion, precision, device)
                figures[f"{base.model_type} {conversion} {precision}"] = f"{loss:.1e} {gradient:.1e}"
                ok = ok and loss <= LOSS[precision] and gradient <= GRADIENT[precision]
    return passed(ok), {"relative error of loss and of gradients": figures}


def _model_errors(base: PreTrainedConfig, conversion: str, precision: str, device: str) -> tuple[float, float]:
    weights = {} if conversion == "dense" else {"load_balance_weight": 0.01, "router_z_weight": 0.001}
    config = models.run_config(conversion, alpha=0.0, precision=precision, experts=weights)
    ours = models.joint(config, models.explainer(config, base, "cpu"))
    wide = models.run_config(conversion, alpha=0.0, experts=weights | {"implementation": "eager"})
    true = models.joint(wide, models.explainer(wide, base, "cpu"))
    true.load_state_dict(ours.state_dict())
    batch = models.batch_of(ours.explainer, 6, 24, unscored=0.5)
    batch["attention_mask"][0, :3] = 0  # as in generation
    batch["attention_mask"][1, -4:] = 0  # as in training
    batch["labels"][1, -4:] = -100
    found: list[tuple[Tensor, Tensor]] = []
    for joint, place in ((true.double(), "cpu"), (ours.to(device), device)):
        joint.train()
        loss = joint(**{name: value.to(place) for name, value in batch.items()})["loss"]
        loss.backward()
        flat = [p.grad.flatten().double().cpu() for p in joint.parameters() if p.grad is not None]
        found.append((loss.detach(), torch.cat(flat)))
    (true_loss, true_gradient), (loss, gradient) = found
    return distance(loss, true_loss), distance(gradient, true_gradient)


def experts(device: str, tiny: bool) -> tuple[str, Figures]:
    """Each kernel's output and weight gradients, with experts that get no token, in memory that held NaN."""
    sizes = [(64, 8)] if tiny else [(576, 8), (576, 128), (576, 1280)]
    figures: Figures = {}
    ok = True
    for hidden, inner in sizes:
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            for kernel in ("auto", "grouped_mm", "eager"):
                worst, idle = _expert_errors(hidden, inner, dtype, kernel, device)
                figures[f"{kernel} {name} {hidden}x{inner}"] = f"{worst:.1e} {idle:.0e}"
                ok = ok and worst <= (1e-4 if name == "fp32" else 0.02) and idle == 0
    return passed(ok), {"relative error, largest gradient of an expert without tokens": figures}


def _expert_errors(hidden: int, inner: int, dtype: torch.dtype, kernel: str, device: str) -> tuple[float, float]:
    """The worst error of output and weight gradients, and the largest gradient of an expert without tokens."""
    spec = MoeSpec(
        hidden_size=hidden, experts=12, top_k=2, expert_size=inner, gates=1, activation="silu", gated=True
    )  # fmt: skip
    torch.manual_seed(0)
    base = SwiGluExperts(PreTrainedConfig(experts_implementation=kernel), spec)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    base.to(dtype)
    true = copy.deepcopy(base).double()
    true.config = PreTrainedConfig(experts_implementation="eager")
    ours = base.to(device)
    worst, idle = 0.0, 0.0
    for tokens in (1, 5, 96):
        hidden_MD = torch.randn(tokens, hidden).to(dtype)
        used = torch.tensor([0, 1, 5, 7])  # the others stay empty
        experts_MS = torch.stack([used[torch.randperm(4)[:2]] for _ in range(tokens)])
        weights_MS = torch.rand(tokens, 2)
        _poison(device)
        outputs = []
        for module, place, wide in ((true, "cpu", torch.float64), (ours, device, dtype)):
            module.zero_grad(set_to_none=True)
            kind = torch.float64 if wide is torch.float64 else torch.float32
            output = module(hidden_MD.to(place, wide), experts_MS.to(place), weights_MS.to(place, kind))
            output.float().pow(2).sum().backward() if wide is not torch.float64 else output.pow(2).sum().backward()
            outputs.append(output.detach())
        worst = max(worst, distance(outputs[1], outputs[0]))
        unused = [expert for expert in range(12) if expert not in used.tolist()]
        for mine, theirs in zip(ours.parameters(), true.parameters(), strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            worst = max(worst, distance(mine.grad, theirs.grad))
            idle = max(idle, float(mine.grad[unused].abs().max()))
    return worst, idle


def _poison(device: str) -> None:
    """Leave NaN in the memory that the next allocations will get."""
    block = torch.full((2**22 if device != "cpu" else 2**16,), float("nan"), device=device)
    del block


def stage1(device: str, tiny: bool) -> tuple[str, Figures]:
    """The same training of stage 1 on the CPU and on the device: its losses, and seconds."""
    epochs = ["stage1.pretrain_epochs=1", "stage1.epochs=2"]
    config = load_config("quickstart", epochs)
    figures: Figures = {}
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        data = synthesize(Path(folder) / "data", users=300, items=150, ratings=6000 if tiny else 20_000, seed=0)
        for number, place in enumerate(("cpu", device)):
            context = LocalContext(device=place)
            started = time.perf_counter()
            metrics = train_stage1(config, data, Path(folder) / str(number), context)
            figures[f"seconds {number} {place}"] = round(time.perf_counter() - started, 2)
            figures[f"rmse {number} {place}"] = metrics["test"]["rmse"]
            losses.append(torch.tensor([line["loss"] for line in context.lines if "loss" in line]))
    error = distance(losses[1], losses[0])
    return passed(error <= 5e-3), figures | {"relative error of the losses": error}


def deepspeed(device: str, tiny: bool) -> tuple[str, Figures]:
    """Every ZeRO stage against plain torch: losses of ten steps with a save and a load in the middle."""
    del tiny
    if importlib.util.find_spec("deepspeed") is None:
        return "SKIP", {"reason": "DeepSpeed is not installed: ZeRO and offload are unchecked"}
    figures: Figures = {}
    ok = True
    for precision in LOSS:
        true = _ten_losses("torch", device, precision=precision)
        for name, options in _zero_variants(device):
            found = _ten_losses("deepspeed", device, precision=precision, **options)
            error = distance(found, true)
            figures[f"{name} {precision}"] = f"{error:.1e}"
            ok = ok and error <= (1e-4 if precision == "fp32" else 2e-2)
    for stage in (1, 2):  # beside autocast's losses, the last ones above
        error = distance(_ten_losses("deepspeed", device, precision="bf16_weights", zero_stage=stage), true)
        figures[f"ZeRO-{stage} bf16_weights"] = f"{error:.1e}"
        ok = ok and error <= 2e-2
    return passed(ok), {"relative error of the losses": figures}


def _zero_variants(device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for stage in range(4):
        yield f"ZeRO-{stage}", {"zero_stage": stage}
    yield "ZeRO-3 checkpointing", {"zero_stage": 3, "gradient_checkpointing": True}
    if device != "cpu":
        yield "ZeRO-2 offload", {"zero_stage": 2, "offload_optimizer": True}
        yield "ZeRO-3 offload", {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}


def _ten_losses(kind: str, device: str, **options: Any) -> Tensor:
    """Losses of ten steps; after five of them the state is saved and read by a new engine."""
    config = models.run_config("shared", batch_size=4, alpha=0.0, learning_rate=3e-3, **options)
    losses: list[float] = []

    def steps(engine: Engine, first: int) -> None:
        for step in range(first, first + 5):
            batch = models.batch_of(engine.module.explainer, 4, 32, seed=step)
            losses.append(float(engine.train_step([batch], PEAK)["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        for half in range(2):
            torch.manual_seed(0)
            explainer = models.explainer(config, models.tiny_llama(), "cpu")
            if config.stage2.gradient_checkpointing:
                explainer.activation_checkpointing_enable()
            engine = make_engine(kind, models.joint(config, explainer), config.stage2, world_size=1, device=device)
            if half:
                engine.load(Path(folder))
            steps(engine, 5 * half)
            if not half:
                engine.save(Path(folder))
            engine.close()
            clock.synchronize(device)
    return torch.tensor(losses)
