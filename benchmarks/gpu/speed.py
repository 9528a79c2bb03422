"""Rates, memory and waits: the machine's own limits, training steps, writing, one layer of the largest model."""

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import Figures, clock, models
from gavamoe.config.schema import RunConfig
from gavamoe.generation.decoding_engine import Engine, Row
from gavamoe.generation.graphed_step import GraphedStep
from gavamoe.generation.sampling import Sampling
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.plan.estimate import own_scheme, scheme_memory
from gavamoe.plan.parameters import draw
from gavamoe.stage1.sparse_adam import RowAdam, clip_gradients
from gavamoe.stage1.vae_gmm import VaeGmm
from gavamoe.stage2.schedule import PEAK
from gavamoe.stage2.training_engines import TorchEngine

GIB = 2**30


def ceilings(device: str, tiny: bool) -> tuple[str, Figures]:
    """What the machine can do at most: denominators of everything below."""
    size, count = (256, 2**20) if tiny else (8192, 2**31)
    figures: Figures = {}
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    figures["copy TB/s, read and written"] = 2 * count / clock.seconds(lambda: target.copy_(source), device) / 1e12
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("fp32", torch.float32, False),
        ("tf32", torch.float32, True),
    ):
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        figures[f"product {name} TFLOP/s"] = 2 * size**3 / clock.seconds(lambda a=left, b=right: a @ b, device) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = False
    if device != "cpu":
        for name in ("pageable", "pinned"):
            host = torch.ones(2**28, dtype=torch.uint8, pin_memory=name == "pinned")
            there = torch.empty_like(host, device=device)
            taken = clock.seconds(lambda a=there, b=host: a.copy_(b), device)
            figures[f"host to device, {name}, GB/s"] = 2**28 / taken / 1e9
    return "PASS", figures


def training(device: str, tiny: bool) -> tuple[str, Figures]:
    """One optimizer step of stage 2 under plain torch, and its peak of memory against the plan's."""
    cases: list[tuple[str, str, int, int, dict[str, Any]]] = []
    if tiny:
        cases = [("tiny", conversion, 4, 32, {"precision": "bf16"}) for conversion in ("dense", "shared")]
    else:
        for conversion in ("dense", "shared", "split", "random"):
            cases.append(("135m", conversion, 8, 96, {"precision": "bf16"}))
        cases += [
            ("135m", "shared", 8, 96, {"precision": "fp32"}),
            ("135m", "dense", 64, 160, {"precision": "bf16"}),
            ("135m", "shared", 64, 160, {"precision": "bf16"}),
            ("135m", "shared", 64, 160, {"precision": "bf16", "gradient_checkpointing": True}),
            ("1b", "dense", 8, 96, {"precision": "bf16"}),
            ("1b", "shared", 8, 96, {"precision": "bf16"}),
            ("1b", "shared", 64, 160, {"precision": "bf16", "gradient_checkpointing": True}),
        ]
    rows: list[dict[str, Any]] = []
    worst = 1.0
    for size, conversion, batch, tokens, options in cases:
        row = _step_of(size, conversion, batch, tokens, options, device)
        rows.append(row)
        if device != "cpu":
            torch.cuda.empty_cache()
            ratio = row["peak / plan"]
            worst = max(worst, ratio, 1 / ratio)
    return ("PASS" if worst <= 1.15 else "FAIL"), {"plan off by at most": worst, "steps": rows}


def _step_of(
    size: str, conversion: str, batch: int, tokens: int, options: dict[str, Any], device: str
) -> dict[str, Any]:
    lengths = {"max_tokens": tokens // 2, "max_explanation_tokens": tokens - tokens // 2}
    config = models.run_config(conversion, size, batch_size=batch, alpha=0.0, zero_stage=0, prompt=lengths, **options)
    base = models.shape_of(size)
    before = torch.cuda.memory_allocated() if device != "cpu" else 0
    model = models.explainer(config, base, device)
    if config.stage2.gradient_checkpointing:
        model.activation_checkpointing_enable()
    engine = TorchEngine(models.joint(config, model), config.stage2, device=device)
    rows = models.batch_of(model, batch, tokens, unscored=0.5)  # the longest answers of the plan

    def step() -> None:
        engine.train_step([rows], PEAK)

    step()  # makes the optimizer's states
    peak = clock.peak_bytes(step, device) - before
    taken = clock.seconds(step, device, rounds=5, warmups=1)
    count = clock.launches(step, device)
    planned = _planned(config, base)
    flops = 6 * models.active_parameters(model) * batch * tokens
    return {
        "case": f"{size} {conversion} {batch}x{tokens} {config.stage2.precision}"
        + (" ckpt" if config.stage2.gradient_checkpointing else ""),
        "ms": taken * 1000,
        "tokens/s": batch * tokens / taken,
        "TFLOP/s": flops / taken / 1e12,
        "peak GiB": peak / GIB,
        "peak / plan": peak / planned if peak else 0.0,
        **count,
    }


def _planned(config: RunConfig, base: Any) -> float:
    """Bytes on the device by the plan, without DeepSpeed's buffers."""
    blueprint = draw(config, base, models.USERS, models.ITEMS)
    checkpointing = config.stage2.gradient_checkpointing
    memory = scheme_memory(config, blueprint, own_scheme(config, 1), checkpointing=checkpointing)
    return memory.device - (0.0 if memory.late else memory.buffers)


def waits(device: str, tiny: bool) -> tuple[str, Figures]:
    """Where a training step, a decoding step and a step of stage 1 wait for the GPU."""
    size = "tiny" if tiny else "135m"
    config = models.run_config("shared", size, batch_size=8, precision="bf16")
    model = models.explainer(config, models.shape_of(size), device)
    engine = TorchEngine(models.joint(config, model), config.stage2, device=device)
    batch = models.batch_of(model, 8, 64)
    figures: Figures = {"training step": clock.waits(lambda: engine.train_step([batch], PEAK), device)}
    model = models.explainer(config, models.shape_of(size), device, torch.bfloat16).eval()
    for name, temperature in (("greedy", 0.0), ("sampled", 0.8)):
        writer = _writer(model, 8, 64)
        _submit(writer, model, 8, 16, 32, temperature)
        writer.step()
        figures[f"decoding step, 8 {name} rows"] = clock.waits(writer.step, device)
    figures["stage-1 step"] = clock.waits(_stage1_step(2000 if tiny else 100_000, 1024, device), device)
    return "PASS", figures


def tables(device: str, tiny: bool) -> tuple[str, Figures]:
    """Steps of stage 1 over tables of growing size: milliseconds, pairs a second, bytes a number."""
    figures: Figures = {}
    sizes = (2000,) if tiny else (100_000, 1_000_000, 4_000_000)
    for rows in sizes:
        for batch in (1024,) if tiny else (1024, 16_384):
            step = _stage1_step(rows, batch, device)
            peak = clock.peak_bytes(step, device)
            taken = clock.seconds(step, device)
            figures[f"{rows} rows of 64, {batch} pairs"] = (
                f"{taken * 1000:.2f} ms, {batch / taken:,.0f} pairs/s, peak {peak / GIB:.2f} GiB"
            )
            del step
            if device != "cpu":
                torch.cuda.empty_cache()
    return "PASS", figures


def _stage1_step(rows: int, batch: int, device: str) -> Any:
    """One optimizer step of stage 1 on `rows` users and items together, as its trainer takes it."""
    config = models.run_config("dense").stage1
    users = rows // 2
    model = VaeGmm(config, users, rows - users, "categorical", models.RATINGS).to(device)
    tables = [model.user_embedding.weight, model.item_embedding.weight]
    model.user_embedding.sparse = model.item_embedding.sparse = True
    own = {id(table) for table in tables}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in own]
    optimizer, row_optimizer = torch.optim.AdamW(dense, fused=True), RowAdam(tables, lr=1e-3)
    draw = torch.Generator().manual_seed(0)
    user_B, item_B = (torch.randint(0, count, (batch,), generator=draw) for count in (users, rows - users))
    rating_B = torch.tensor(models.RATINGS)[torch.randint(0, 5, (batch,), generator=draw)]

    def step() -> None:
        terms = model.elbo(user_B.to(device), item_B.to(device), rating_B.to(device), config.beta)
        terms.loss.backward()
        for table in tables:
            assert table.grad is not None
            table.grad = table.grad.coalesce()
        clip_gradients(dense, tables, 1.0)
        optimizer.step()
        row_optimizer.step()
        model.zero_grad(set_to_none=True)

    return step


def writing(device: str, tiny: bool) -> tuple[str, Figures]:
    """New tokens a second of the decoding engine, prefill apart, by rows, number format and conversion; without
    CUDA graphs too, which must not change a text."""
    new, prompt = (4, 8) if tiny else (48, 48)
    sizes = ("tiny",) if tiny else ("135m", "1b")
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    rows: list[dict[str, Any]] = []
    same = True
    for size in sizes:
        for conversion in ("dense", "shared"):
            for name, dtype in formats.items():
                config = models.run_config(conversion, size)
                model = models.explainer(config, models.shape_of(size), device, dtype).eval()
                for count in (1, 4) if tiny else (1, 16, 64):
                    for temperature in (0.0, 0.8) if count > 1 and name == "bfloat16" else (0.0,):
                        timed = _write(model, count, prompt, new, temperature, device)
                        how = "sampled" if temperature else "greedy"
                        rows.append({"case": f"{size} {conversion} {name} {how} {count} rows", **timed})
                    timed = _write(model, count, prompt, new, 0.0, device, graphs=False)
                    rows.append({"case": f"{size} {conversion} {name} greedy {count} rows, no graphs", **timed})
                    by_graphs, by_launches = (
                        _texts(model, count, prompt, new, graphs=graphs) for graphs in (True, False)
                    )
                    same = same and by_graphs == by_launches
                del model
    return "PASS" if same else "FAIL", {"texts are the same without graphs": same, "texts": rows}


def _texts(model: GavamoeForCausalLM, rows: int, prompt: int, new: int, *, graphs: bool) -> list[list[int]]:
    """Tokens of greedy texts."""
    engine = _writer(model, rows, prompt + new, graphs=graphs)
    _submit(engine, model, rows, prompt, new, 0.0)
    written = list(engine.waiting)
    while engine.busy:
        engine.step()
    return [row.tokens for row in written]


def _write(
    model: GavamoeForCausalLM,
    rows: int,
    prompt: int,
    new: int,
    temperature: float,
    device: str,
    *,
    graphs: bool = True,
) -> dict[str, float]:
    """Three goes, the last one timed: prefill in ms, and the median decoding step. Graphs are recorded in the first."""
    steps: list[float] = []
    first = 0.0
    engine = _writer(model, rows, prompt + new, graphs=graphs)
    for _ in range(3):
        _submit(engine, model, rows, prompt, new, temperature)
        steps = []
        while engine.busy:
            clock.synchronize(device)
            started = time.perf_counter()
            engine.step()
            clock.synchronize(device)
            steps.append(time.perf_counter() - started)
        first, steps = steps[0], sorted(steps[1:])
    middle = steps[len(steps) // 2]
    return {
        "prefill ms": first * 1000,
        "step ms": middle * 1000,
        "step ms, 99 %": steps[int(0.99 * (len(steps) - 1))] * 1000,
        "tokens/s": rows / middle,
    }


def _writer(model: GavamoeForCausalLM, rows: int, capacity: int, *, graphs: bool = True) -> Engine:
    engine = Engine(model, -1, [0], slots=rows, capacity=capacity, max_waiting=rows, prefill_rows=rows)
    if not graphs and isinstance(engine.step_pass, GraphedStep):
        engine.step_pass = engine.step_pass.plain
    return engine


def _submit(engine: Engine, model: GavamoeForCausalLM, rows: int, prompt: int, new: int, temperature: float) -> None:
    ids_BT = models.batch_of(model, rows, prompt)["input_ids"]
    for row, ids in enumerate(ids_BT.tolist()):
        engine.submit(Row(ids, row % model.config.n_gates, Sampling(new, temperature=temperature, seed=row)))


def layer(device: str, tiny: bool) -> tuple[str, Figures]:
    """One layer of an 8B explainer: forward and backward, and a decoding step, by precision."""
    size, lengths = ("tiny", (16,)) if tiny else ("8b", (64, 512, 4096))
    base = models.shape_of(size)
    figures: list[dict[str, Any]] = []
    for name, dtype in (("autocast", torch.float32), ("bf16 weights", torch.bfloat16)):
        config = models.run_config("random", size)
        model = models.explainer(config, base, device, dtype, layers=1)
        decoder = model.model.layers[0] if hasattr(model.model, "layers") else model.model
        weights = sum(parameter.numel() for parameter in decoder.parameters())
        for tokens in lengths:
            rows = max(tokens // 64, 1)
            hidden = torch.randn(rows, tokens // rows, base.hidden_size, device=device, dtype=dtype)
            clusters = torch.arange(rows, device=device) % model.config.n_gates

            def pass_both(model: Any = model, hidden: Tensor = hidden, clusters: Tensor = clusters) -> None:
                enabled = model.dtype == torch.float32
                with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled, cache_enabled=False):
                    output = model.model(inputs_embeds=hidden, cluster_ids=clusters, use_cache=False)
                output.last_hidden_state.float().pow(2).mean().backward()
                model.zero_grad(set_to_none=True)

            taken = clock.seconds(pass_both, device)
            figures.append({"case": f"{name} {tokens} tokens", "ms": taken * 1000, **clock.launches(pass_both, device)})
        figures[-1]["parameters"] = weights
        del model
    return "PASS", {"forward and backward of one layer": figures}


def largest(device: str, tiny: bool) -> tuple[str, Figures]:
    """The whole 8B explainer, random weights: start, memory and decoding, in bfloat16."""
    size = "tiny" if tiny else "8b"
    started = time.perf_counter()
    config = models.run_config("random", size)
    model = models.explainer(config, models.shape_of(size), device, torch.bfloat16).eval()
    clock.synchronize(device)
    figures: Figures = {
        "seconds to make": time.perf_counter() - started,
        "billion parameters": sum(parameter.numel() for parameter in model.parameters()) / 1e9,
    }
    for rows in (1, 64):
        timed: dict[str, float] = {}

        def run(rows: int = rows, timed: dict[str, float] = timed) -> None:
            timed |= _write(model, rows, 8 if tiny else 48, 4 if tiny else 24, 0.0, device)

        peak = clock.peak_bytes(run, device)
        figures[f"{rows} rows"] = {**timed, "peak GiB": peak / GIB}
    return "PASS", figures
