"""The baselines by the name of their system; a baseline's code is imported when it is needed."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gavamoe.config.baselines import baseline_section, reads_features
from gavamoe.config.schema import RunConfig
from gavamoe.errors import InputError

if TYPE_CHECKING:
    from gavamoe.baselines.frame import Baseline


@dataclass(frozen=True)
class Entry:
    """One system."""

    name: str
    """What `--system` and `ablate --only` call it."""
    label: str
    """Name in tables and figures."""
    what: str
    """Description in a few words."""
    class_name: str
    """Its class, in the module of this package that has the name of its section in `baselines`."""

    @property
    def module(self) -> str:
        """Its module, and its section in `baselines`."""
        return baseline_section(self.name)

    @property
    def features(self) -> bool:
        """Whether it reads the features that a text is to speak of."""
        return reads_features(self.name)

    def load(self) -> "type[Baseline]":
        """Its class."""
        found: type[Baseline] = getattr(import_module(f"{__package__}.{self.module}"), self.class_name)
        return found

    def settings(self, config: RunConfig) -> Any:
        """Its section of the config."""
        return getattr(config.baselines, self.module)


BASELINES = {
    entry.name: entry
    for entry in (
        Entry("peter", "PETER", "a small Transformer on the two ids (Li et al. 2021)", "Peter"),
        Entry("peter-plus", "PETER+", "the same, which reads the features too", "Peter"),
        Entry("nete", "NETE", "two gated recurrent networks, for words and for one feature (Li et al. 2020)", "Nete"),
        Entry("pepler", "PEPLER", "a language model prompted by the two ids (Li et al. 2023)", "Pepler"),
        Entry("pepler-plus", "PEPLER+F", "the same, which reads rating and features too", "Pepler"),
        Entry("cier", "CIER", "a language model that reads ratings off itself (Liu et al. 2025)", "Cier"),
        Entry("cier-plus", "CIER+F", "the same, which reads the features too", "Cier"),
        Entry("g-refer", "G-Refer", "a language model that reads neighbors' explanations (Li et al. 2025)", "GRefer"),
        Entry("g-refer-plus", "G-Refer+F", "the same, which reads rating and features too", "GRefer"),
        Entry("xrec", "XRec", "a frozen language model that reads vectors of a graph (Ma et al. 2024)", "Xrec"),
        Entry("xrec-plus", "XRec+F", "the same, which reads rating and features too", "Xrec"),
        Entry(
            "pevae", "PEVAE", "a hierarchical variational autoencoder on the two ids (after Cai & Cai 2022)", "Pevae"
        ),
        Entry("pevae-plus", "PEVAE+F", "the same, which reads rating and features too", "Pevae"),
    )
}


def find_baseline(name: str) -> Entry:
    """A baseline by the name of its system.

    Raises:
        InputError: there is none of that name.
    """
    if name not in BASELINES:
        raise InputError(f"system {name}: no baseline; known are {', '.join(BASELINES)}")
    return BASELINES[name]
