"""A chaos run: the commands of a user in a loop, random faults, and what each piece of work ends with.

    python -m tests.helpers.chaos --minutes 30 --seed 0 --report FILE

First every kind of work runs undisturbed; its numbers are the reference. Then a seeded generator draws work, faults and
their moments. After its faults the same command runs again, and the numbers have to be those of the reference. What is
drawn depends on the seed alone, never on the clock; how much of it fits depends on the machine.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import chaos_serve
from .chaos_faults import DISK, INT, KILL_WORKER, MEBIBYTE, TERM, Attempt, Command, Moment, mount, resize, run, unmount
from .chaos_work import VARIANTS, WORKS, Base, Work, first_difference
from .cli import command

SERVE = "serve"
WANTED = {"prepare": 24, "copy": 24, "evaluate": 12, "train": 10, "tune": 10, SERVE: 22}
"""Faults that each kind of work is to see."""
TAKE_A_RUN = {"copy", "evaluate", SERVE}
"""Works that begin with the run of the first reference."""
ROOM = 64 * MEBIBYTE
"""Size of a disk with room for everything."""
TWO_DAYS = 2 * 86_400


@dataclass
class Report:
    """What a chaos run did."""

    faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Faults by work and kind."""
    late: int = 0
    """Faults that came after the command had ended by itself: they don't count."""
    checked: Counter[str] = field(default_factory=Counter)
    """Outcomes compared with the reference, by work."""
    problems: list[str] = field(default_factory=list)
    """Everything that was not as it should be."""
    skipped: list[str] = field(default_factory=list)
    """What could not be tried here, with its reason."""
    answers: dict[str, int] = field(default_factory=dict)
    """Answers of the service by status."""
    slowest: float = 0.0
    """Seconds of the slowest answered request, retries included."""
    leftovers: int = 0
    """Hidden files and folders that killed commands left, before the clean-up."""
    seconds: float = 0.0

    def total(self, work: str = "") -> int:
        return sum(count for (name, _), count in self.faults.items() if work in ("", name))

    def as_json(self) -> dict[str, Any]:
        table: dict[str, dict[str, int]] = {}
        for (work, fault), count in sorted(self.faults.items()):
            table.setdefault(work, {})[fault] = count
        rest = {name: value for name, value in vars(self).items() if name != "faults"}
        return {"total": self.total(), "faults": table} | rest


class Chaos:
    """One chaos run in a folder."""

    def __init__(
        self, folder: Path, seed: int, minutes: float, say: Callable[[str], None] = print, only: Sequence[str] = ()
    ) -> None:
        """`only` names the kinds of work to do; all, if none is named."""
        self._wanted = {name: count for name, count in WANTED.items() if not only or name in only}
        self.base, self.draw, self.say = Base(folder), random.Random(seed), say
        self.report = Report()
        self._began, self._limit = time.monotonic(), 60 * minutes
        self._references: dict[str, tuple[Any, Attempt]] = {}
        self._works: dict[Path, Work] = {}
        self._may_mount = True
        self._running: Command | None = None

    def run(self) -> Report:
        """Do everything; the report is whole whatever happens."""
        try:
            for name in WORKS:
                for variant in dict.fromkeys(VARIANTS.get(name, ("",))):
                    taken = (name, variant) == ("train", "torch") and not TAKE_A_RUN.isdisjoint(self._wanted)
                    if name in self._wanted or taken:
                        self._reference(name, variant)
            if SERVE in self._wanted:
                self._serve()
            while (name := self._next()) is not None:
                self._chain(name)
            self._clean_up()
        finally:
            if self._running is not None:
                self._running.kill()
            for place in self._works:
                unmount(place)
            self.report.seconds = time.monotonic() - self._began
            self.base.close()
        return self.report

    def _next(self) -> str | None:
        """The kind of work that comes next, by what is still wanted of each; None when all is done."""
        if time.monotonic() - self._began > self._limit:
            return None
        left = {name: max(0, self._wanted[name] - self.report.total(name)) for name in WORKS if name in self._wanted}
        if not any(left.values()):
            return None
        return self.draw.choices(list(left), weights=list(left.values()))[0]

    def _reference(self, name: str, variant: str) -> None:
        place = self.base.folder / "reference" / f"{name} {variant}".strip()
        work = WORKS[name](self.base, place, variant)
        work.begin()
        attempt = self._run(work, None, None, [])
        outcome = work.outcome()
        if attempt.code or outcome is None:
            raise RuntimeError(f"{place.name}: ends with {attempt.code} undisturbed: {attempt.shown[-5:]}")
        if attempt.left:
            self.report.problems.append(f"{place.name}: leaves processes: {attempt.left}")
        self._references[place.name] = outcome, attempt
        self.say(f"{place.name}: {attempt.seconds:.0f} s, {len(attempt.times)} events, {attempt.peak >> 10} KiB")

    def _run(self, work: Work, fault: str | None, moment: Moment | None, usual: list[float]) -> Attempt:
        self._running = Command(
            command(*work.arguments()), self.base.environment, work.place, self.base.folder / "standard-error"
        )
        return run(self._running, fault, moment, self.draw, usual, deep=KILL_WORKER in work.faults)

    def _chain(self, name: str) -> None:
        """One piece of work: some faults after one another, then the command without one, then the comparison."""
        variant = self.draw.choice(VARIANTS.get(name, ("",)))
        place = self.base.folder / "work" / f"{len(self._works):04}"
        work = self._works[place] = WORKS[name](self.base, place, variant)
        faults = self._faults(work, self.draw.randint((work.longest + 1) // 2, work.longest))
        if DISK in faults and not (self._may_mount and mount(place, ROOM)):
            self._may_mount, faults = False, [fault for fault in faults if fault != DISK]
            self.report.skipped = ["full disk: mounting needs root"]
        work.begin()
        label = f"{name} {variant}".strip()
        for fault in faults:
            attempt = self._disturbed(work, label, fault)
            if not attempt.struck:
                break
        self._finish(work, label, faults)

    def _faults(self, work: Work, count: int) -> list[str]:
        """As many kinds of faults, each one of those that this work has met least."""
        seen, drawn = {fault: self.report.faults[work.name, fault] for fault in work.faults}, list[str]()
        for _ in range(count):
            drawn.append(self.draw.choice([fault for fault, met in seen.items() if met == min(seen.values())]))
            seen[drawn[-1]] += 1
        return drawn

    def _disturbed(self, work: Work, label: str, fault: str) -> Attempt:
        _, usual = self._references[label]
        moment = Moment(self.draw.randrange(1, len(usual.times) + 1), self.draw.random())
        if fault == DISK:
            used = sum(path.lstat().st_blocks * 512 for path in work.place.rglob("*"))
            more = max(usual.peak - used, 0) * self.draw.uniform(0.02, 0.95)
            resize(work.place, int(used + more) + 8192)
        attempt = self._run(work, fault, moment, usual.times)
        if fault == DISK:
            resize(work.place, ROOM)
        at = f"event {moment.events} of {len(usual.times)}"
        if attempt.struck:
            self.report.faults[work.name, fault] += 1
        else:
            self.report.late += 1
        self._blame(f"{label}, {fault}, {at}: {problem}" for problem in wrong_with(attempt, fault))
        told = "" if attempt.struck else " (came too late)"
        self.say(f"{self.report.total():4} {label}: {fault}, {at}{told}: {attempt.code} {attempt.shown[-1:]}")
        return attempt

    def _finish(self, work: Work, label: str, faults: list[str]) -> None:
        """The same command until it is done, and the comparison. Work that was complete when the fault came is told
        by commands without --resume as being there already."""
        attempt = self._run(work, None, None, [0.0])
        there = attempt.code == 2 and any("already exists" in line for line in attempt.shown)
        outcome = work.outcome()
        told = f"{label} after {faults}"
        if attempt.code and not there:
            self._blame([f"{told}: ends with {attempt.code}: {attempt.shown[-3:]}"])
        elif difference := first_difference(self._references[label][0], outcome):
            self._blame([f"{told}: {difference}"])
        self.report.checked[work.name] += 1

    def _blame(self, problems: Iterable[str]) -> None:
        for problem in problems:
            self.report.problems.append(problem)
            self.say(f"     WRONG: {problem}")

    def _serve(self) -> None:
        """The service under load: all its faults, one after the other."""
        kept = self.base.folder / "reference" / "train torch" / "run"
        service = chaos_serve.Service(self.base, kept, self.base.folder / "serve")
        service.start()
        clients = chaos_serve.Clients(service.url)
        try:
            clients.learn()
            kills = WANTED[SERVE] - len(chaos_serve.OF_COMMAND)
            faults = [*chaos_serve.OF_COMMAND, *(kills * chaos_serve.OF_SERVICE)[:kills]]  # a new start takes longest
            self.draw.shuffle(faults)
            for fault in faults:
                began = time.monotonic()
                self._blame(chaos_serve.strike(service, clients, fault, self.draw))
                self._blame(clients.told())
                self.report.faults[SERVE, fault] += 1
                took = time.monotonic() - began
                self.say(f"{self.report.total():4} serve: {fault}, {took:.0f} s, {dict(clients.counts)}")
        finally:
            clients.stop()
            self._blame([*clients.told(), *service.end(signal.SIGINT)])
            self.report.answers, self.report.slowest = dict(clients.counts), clients.slowest
        self.report.checked[SERVE] = clients.counts["200"]

    def _clean_up(self) -> None:
        """Two days later every command runs once more where it was killed; no hidden partial may stay."""
        before = [path for place in self._works for path in partials(place)]
        self.report.leftovers = len(before)
        for place in {place for place in self._works if any(partials(place))}:
            for path in [place, *place.rglob("*")]:
                then = time.time() - TWO_DAYS
                os.utime(path, (then, then), follow_symlinks=False)
            self._again(place)
        left = [str(path.relative_to(self.base.folder)) for place in self._works for path in partials(place)]
        self.report.problems += [f"left for ever: {path}" for path in left]

    def _again(self, place: Path) -> None:
        """The same command once more in a folder: what it refuses to make twice is taken away first."""
        work = self._works[place]
        for made in ("made", "copied"):
            shutil.rmtree(place / made, ignore_errors=True)
        attempt = self._run(work, None, None, [0.0])
        if attempt.code:
            self.report.problems.append(f"{work.name}, once more: ends with {attempt.code}: {attempt.shown[-3:]}")


def partials(place: Path) -> list[Path]:
    """What was being written, or replaced, when a command was killed."""
    return [path for path in place.rglob("*") if ".partial-" in path.name or ".replaced-" in path.name]


def wrong_with(attempt: Attempt, fault: str) -> list[str]:
    """What a command did that it may not do, whatever befell it."""
    problems = []
    if attempt.hung:
        problems.append("hangs")
    if attempt.left:
        problems.append(f"leaves processes: {attempt.left}")
    if attempt.traceback:
        problems.append(f"shows a traceback: {attempt.shown[-4:]}")
    if not attempt.struck:
        return problems + ([f"ends with {attempt.code}: {attempt.shown[-3:]}"] if attempt.code else [])
    last = attempt.shown[-1] if attempt.shown else ""
    for asked, number, code, word in (
        (INT, signal.SIGINT, 130, "interrupted"),
        (TERM, signal.SIGTERM, 143, "terminated"),
    ):
        too_late = attempt.code == -number and not attempt.traceback  # the command itself was over
        if fault == asked and not (too_late or (attempt.code == code and word in last)):
            problems.append(f"ends with {attempt.code}: {attempt.shown[-3:]}")
    if fault == DISK and not (attempt.code in (1, 2) and last.startswith("error:")):
        problems.append(f"ends with {attempt.code}: {attempt.shown[-3:]}")
    if fault == KILL_WORKER and not (attempt.code == 0 or (attempt.code == 1 and "--resume" in last)):
        problems.append(f"ends with {attempt.code}: {attempt.shown[-3:]}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="draw no further work after these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, required=True, help="JSON file")
    parser.add_argument("--only", help="kinds of work, separated by commas; default: all")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="gavamoe-chaos-"))
    only = options.only.split(",") if options.only else ()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was seen until then is reported
    chaos = Chaos(folder, options.seed, options.minutes, lambda text: print(text, flush=True), only)
    try:
        chaos.run()
    finally:
        told = json.dumps(chaos.report.as_json(), indent=2)
        options.report.write_text(told + "\n")
        print(told)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
