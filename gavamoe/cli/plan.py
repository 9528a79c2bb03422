"""`gavamoe plan`: parse, call, print."""

from pathlib import Path
from typing import Annotated

import typer

from gavamoe.cli.options import Json, Set, input_folder
from gavamoe.errors import InputError

_SIZES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def plan(
    config: Annotated[
        str, typer.Argument(help="Config file, or a preset: quickstart, reviews, smollm2, gpt2, paper, paper-fast.")
    ],
    dataset: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", parser=input_folder, help="Dataset or URI; or give --users, --items and --rows instead."
        ),
    ] = None,
    users: Annotated[int | None, typer.Option(min=1, help="Known users.")] = None,
    items: Annotated[int | None, typer.Option(min=1, help="Known items.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Reviews in all; four fifths of them train.")] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Number of devices; default: the config's runtime.workers.")
    ] = None,
    device_memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory of one device, such as 48GiB.")] = "80GiB",
    device_tflops: Annotated[
        float, typer.Option(help="Peak of one device in bf16, TFLOP/s; 312: A100, 989: H100, 149: L40.")
    ] = 312.0,
    utilization: Annotated[float, typer.Option(help="Share of that peak that the model reaches.")] = 0.4,
    device_bandwidth: Annotated[
        float | None,
        typer.Option(help="GB/s that a device sends; default 200 (NVLink), 25 (a network) above 8 devices."),
    ] = None,
    memory_bandwidth: Annotated[
        float, typer.Option(help="TB/s of a device's own memory; 2: A100 of 80 GB, 3: H100, .86: L40.")
    ] = 2.0,
    prompt_tokens: Annotated[
        float | None, typer.Option(help="Mean tokens of a prompt; default: the dataset's, or the config's maximum.")
    ] = None,
    answer_tokens: Annotated[
        float | None, typer.Option(help="Mean tokens of an explanation; default likewise.")
    ] = None,
    base_config: Annotated[
        Path | None, typer.Option(help="config.json of the base model, where the hub is out of reach.")
    ] = None,
    overrides: Set = None,
    json_output: Json = False,
) -> None:
    """Estimate what a config costs: parameters, memory per device, time, traffic. Loads no weights.

    For example: gavamoe plan paper --users 9765 --items 6280 --rows 320023 --devices 8 --device-memory 48GiB
    """
    from gavamoe.cli.output.plan import print_plan
    from gavamoe.config.files import load_config
    from gavamoe.plan.estimate import Hardware, Workload, make_plan

    settings = load_config(config, overrides or [])
    counts = (users, items, rows)
    prompt = settings.stage2.prompt
    lengths: tuple[float, float] = (prompt.max_tokens, prompt.max_explanation_tokens)
    if dataset is not None:
        if any(count is not None for count in counts):
            raise InputError("--dataset and --users, --items, --rows exclude each other")
        from gavamoe.plan.estimate import measure_dataset

        known_users, known_items, training, lengths = measure_dataset(settings, dataset, lengths)
    elif users is None or items is None or rows is None:
        raise InputError("give --dataset, or all of --users, --items and --rows")
    else:
        known_users, known_items, training = users, items, max(1, round(0.8 * rows))
    number = devices or settings.runtime.workers
    bandwidth = device_bandwidth if device_bandwidth is not None else (200.0 if number <= 8 else 25.0)
    workload = Workload(
        known_users, known_items, training,
        lengths[0] if prompt_tokens is None else prompt_tokens,
        lengths[1] if answer_tokens is None else answer_tokens,
    )  # fmt: skip
    hardware = Hardware(
        number, bytes_of(device_memory), device_tflops * 1e12, utilization, bandwidth * 1e9, memory_bandwidth * 1e12
    )
    print_plan(make_plan(settings, workload, hardware, base_config), as_json=json_output)


def bytes_of(text: str) -> float:
    """ "48GiB" -> 48 x 2^30."""
    number = text.rstrip("BGKMTi ")
    unit = text[len(number) :].strip()
    try:
        return float(number) * _SIZES[unit]
    except (KeyError, ValueError):
        raise InputError(f"--device-memory {text}: expected a number and a unit, such as 48GiB") from None


def doctor(
    base_model: Annotated[
        str, typer.Option(help="The base model that is to be reached, as stage2.base_model names it.")
    ] = "scratch",
    folder: Annotated[Path, typer.Option(help="Where runs are to be written.")] = Path(),
    json_output: Json = False,
) -> None:
    """Is this machine ready? Versions, devices, Ray, disks, ports, base model; what is wrong, and the way out."""
    from dataclasses import asdict

    from gavamoe.cli.terminal import console, print_json, print_table
    from gavamoe.runtime.machine import examine

    found = examine(base_model, folder)
    if json_output:
        print_json([asdict(finding) for finding in found])
    print_table("This machine", ["", "", "found"], [(each.what, each.state, each.found) for each in found])
    for each in found:
        if each.way_out:
            console.print(f"{each.state}: {each.what}: {each.found}; {each.way_out}", markup=False, soft_wrap=True)
    if any(each.state == "wrong" for each in found):
        raise typer.Exit(1)
    console.print("ready: `gavamoe quickstart` is the first thing to try", markup=False)
