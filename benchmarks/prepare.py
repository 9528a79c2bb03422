"""How fast `data prepare` is and how much memory it takes, on files it generates.

    python benchmarks/prepare.py [--rows 2000000] [--table-rows 300000] [--keep DIR] [--workers ROUNDS]

Amazon-style JSON lines (one file of --rows rows) and, of --table-rows rows each, CSV, Parquet and JSON lines
tables with and without a feature column. Each source is prepared in a process of its own (prepare starts no other);
reported are rows a second and the peak resident memory. Linux only.

--workers: instead, reviews of --table-rows rows as JSON lines and Parquet by one process, by one Ray worker and by two
(their start is not counted), which take turns for so many rounds. CPU seconds of all processes are told as well: "at
best" is what they allow on idle cores, where those that the command spends after the workers' last are not shared.
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

NOUNS = """
battery screen case cable charger sound keyboard price shipping packaging colour size button strap lens
""".split()
WORDS = """
the a this my it is was and but for with really after two weeks of use I think that looks feels good great poor
nice cheap solid broke works as expected would buy again never more than one reason to like
""".split()
SECONDS_AND_MEMORY = """
import json, psutil, sys, time
from pathlib import Path
from gavamoe.cli.data import _side_by_side
from gavamoe.data.prepare import prepare
source, out, format, text_mode, workers = sys.argv[1:]

def warm(number):
    import gavamoe.data.judging, gavamoe.data.text.choosing
    time.sleep(2)

def cpu_seconds():
    mine = psutil.Process()
    return sum(sum(each.cpu_times()[:2]) for each in [mine, *mine.children(recursive=True)])

def peak_mib(process):
    # not ru_maxrss, in which a new process inherits the peak of the one that started it
    lines = open(f"/proc/{process.pid}/status")
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

ended = []

def marked(function, shared, jobs):
    yield from run(function, shared, jobs)
    ended.append(time.process_time())

with _side_by_side(int(workers)) as run:
    if int(workers):
        list(run(warm, (), [(number,) for number in range(int(workers))]))
    before, start = cpu_seconds(), time.perf_counter()
    summary = prepare(Path(source), Path(out), format, text_mode=text_mode or None, run=marked)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - before
    alone = time.process_time() - ended[-1]
    ray = [each for each in psutil.Process().children(recursive=True) if each.name().startswith("ray::IDLE")]
    worker = max(map(peak_mib, ray), default=0)
found = {"seconds": seconds, "cpu": cpu, "kept": summary.kept, "alone": alone}
print(json.dumps(found | {"peak_mib": peak_mib(psutil.Process()), "worker_mib": worker}))
"""


def texts(rng: random.Random, sentences: int) -> str:
    """A review of some sentences, each around one noun."""
    parts = []
    for _ in range(sentences):
        words = rng.choices(WORDS, k=rng.randint(6, 16))
        words.insert(rng.randrange(len(words)), "the " + rng.choice(NOUNS))
        parts.append(" ".join(words).capitalize() + ".")
    return " ".join(parts)


def rows(count: int, sentences: int, seed: int = 0) -> Iterator[dict[str, object]]:
    """Rows with long-tailed users and items; texts are drawn from a pool, since making them takes longest."""
    rng = random.Random(seed)
    pool = [texts(rng, rng.randint(1, 2 * sentences - 1)) for _ in range(20_000)]
    for number in range(count):
        yield {
            "user": f"A{int(rng.paretovariate(0.3)) % (count // 5 + 10):09d}",
            "item": f"B{int(rng.paretovariate(0.4)) % (count // 20 + 10):09d}",
            "rating": float(rng.randint(1, 5)),
            "text": rng.choice(pool) + f" {number}",
            "features": rng.choice(NOUNS),
        }


def write_amazon(path: Path, count: int) -> None:
    """Reviews of about 45 words under Amazon's 2018 field names."""
    with open(path, "w", encoding="utf-8") as file:
        for number, row in enumerate(rows(count, sentences=4)):
            record = {
                "overall": row["rating"],
                "verified": True,
                "reviewTime": "06 17, 2018",
                "reviewerID": row["user"],
                "asin": row["item"],
                "reviewerName": "somebody",
                "reviewText": row["text"],
                "summary": "Five Stars",
                "unixReviewTime": 1_500_000_000 + number,
            }
            file.write(json.dumps(record) + "\n")


def write_tables(folder: Path, count: int) -> list[tuple[str, Path]]:
    """The same explanations of about 12 words as CSV, Parquet and JSON lines, with and without features."""
    table = pa.Table.from_pylist(list(rows(count, sentences=1)))
    made = []
    for name, part in (("with features", table), ("features extracted", table.drop_columns(["features"]))):
        stem = name.replace(" ", "_")
        pq.write_table(part, folder / f"{stem}.parquet")
        pa_csv.write_csv(part, folder / f"{stem}.csv")
        with open(folder / f"{stem}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in part.to_pylist())
        made += [(f"{kind}, {name}", folder / f"{stem}.{kind}") for kind in ("parquet", "csv", "jsonl")]
    return made


def prepared(source: Path, format: str, text_mode: str = "", workers: int = 0) -> dict[str, float]:
    """What SECONDS_AND_MEMORY prints of one preparation."""
    out = source.with_suffix(".dataset")
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", SECONDS_AND_MEMORY, str(source), str(out), format, text_mode, str(workers)]
    result: dict[str, float] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )
    shutil.rmtree(out)
    return result


def compare_workers(folder: Path, count: int, rounds: int) -> None:
    """Print the rates of one process, one worker and two, on the same reviews."""
    table = pa.Table.from_pylist(list(rows(count, sentences=4))).drop_columns(["features"])
    pq.write_table(table, folder / "reviews.parquet")
    with open(folder / "reviews.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
    del table
    for kind in ("jsonl", "parquet"):
        found: dict[int, list[dict[str, float]]] = {0: [], 1: [], 2: []}
        for _ in range(rounds):
            for workers, results in found.items():
                results.append(prepared(folder / f"reviews.{kind}", "table", "review", workers))
        middle = {n: _medians(results) for n, results in found.items()}
        for workers, each in middle.items():
            print(
                f"{kind}, {count:,} reviews, {f'{workers} worker(s)' if workers else 'one process':12}:"
                f" {count / each['seconds']:,.0f} rows/s, CPU {each['cpu']:.1f} s; peak of the command"
                f" {each['peak_mib']:.0f} MiB, of a worker {each['worker_mib']:.0f} MiB"
            )
        times, cpu, alone = ({n: middle[n][name] for n in middle} for name in ("seconds", "cpu", "alone"))
        print(
            f"  two workers are {times[1] / times[2]:.2f} times as fast as one,"
            f" {times[0] / times[2]:.2f} as one process;"
            f"\n  at best {cpu[0] / (alone[2] + (cpu[2] - alone[2]) / 2):.2f} on two idle cores, of which the command's"
            f" {alone[2]:.1f} s are after the workers' last"
        )


def _medians(results: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in results) for name in results[0]}


def measure(name: str, source: Path, format: str, count: int) -> None:
    """Prepare `source` in a new process and print its rate and peak memory."""
    result = prepared(source, format)
    rate = count / result["seconds"]
    size = source.stat().st_size / 2**20
    print(
        f"{name:32} {count:>9,} rows {size:7.0f} MiB {result['seconds']:7.1f} s (CPU {result['cpu']:5.1f}) "
        f"{rate:>9,.0f} rows/s, peak {result['peak_mib']:6.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000, help="rows of the JSON-lines file")
    parser.add_argument("--table-rows", type=int, default=300_000, help="rows of each table")
    parser.add_argument("--keep", type=Path, help="generate the files here and leave them")
    parser.add_argument("--workers", type=int, default=0, metavar="ROUNDS", help="compare workers, nothing else")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if options.workers:
            compare_workers(folder, options.table_rows, options.workers)
            return
        for name, path in write_tables(folder, options.table_rows):
            measure(name, path, "table", options.table_rows)
        amazon = folder / "amazon.jsonl"
        start = time.perf_counter()
        write_amazon(amazon, options.rows)
        print(f"(generated {options.rows:,} reviews in {time.perf_counter() - start:.0f} s)")
        measure("amazon reviews, json lines", amazon, "amazon", options.rows)


if __name__ == "__main__":
    main()
