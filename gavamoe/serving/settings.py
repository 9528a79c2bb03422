"""Everything that a deployed service can be told: the typed arguments of the app builder, in YAML and in Python."""

import hashlib
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from gavamoe.config.section import Section
from gavamoe.errors import InputError

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
LOG_NAME = "ray.serve.gavamoe"
"""The service's own log lines go where Ray Serve's go, with the same request ids."""
EMPTY_KEY_HASH = hashlib.sha256(b"").hexdigest()
"""What `printf %s "$KEY" | sha256sum` prints where KEY is not set."""


class Limits(Section):
    """Bounds that protect the service."""

    request_timeout_s: Positive = 30.0
    """A request that takes longer is answered with 504, and its rows are freed."""
    max_body_bytes: Count = 64 * 1024
    body_timeout_s: Positive = 10.0
    """A body that is not there by then is answered with 408, and the connection is closed."""
    max_unfinished_bodies: Count = 64
    """Bodies that one ingress replica waits for; when another comes, the one that took longest is given up (408)."""
    max_new_tokens: Annotated[int, Field(ge=1, le=512)] = 128
    """Largest that a request may ask for."""
    max_batch: Annotated[int, Field(ge=1, le=64)] = 32
    """Pairs of one batch request."""
    max_in_flight: Count = 256
    """Requests that one ingress replica works on; more are answered with 429."""
    key_in_flight: Count | None = None
    """Requests of one API key that an ingress replica works on at a time, unless the file of keys gives the key an
    `in_flight=` of its own; None: as many as `max_in_flight`."""
    key_per_minute: Count | None = None
    """Requests that an ingress replica takes from one API key in a minute, unless the file of keys gives the key a
    `per_minute=` of its own; None: no limit."""
    retry_after_s: Count = 1
    """What a client that was turned away is told to wait."""
    retries: Annotated[int, Field(ge=0, le=10)] = 4
    """Other replicas that are tried when one dies with a request that has not answered anything yet."""


class GeneratorSettings(Section):
    """The engine of each generator replica."""

    slots: Annotated[int, Field(ge=1, le=1024)] = 16
    """Texts that are written at the same time."""
    max_waiting: Annotated[int, Field(ge=0, le=10_000)] = 64
    """Texts that may wait for a slot, per replica."""
    prefill_rows: Count = 8
    """New texts a step."""
    threads: Count = 1
    """CPU threads of a replica."""
    device: Literal["cpu", "cuda"] = "cpu"
    """"cuda" needs `num_gpus` above 0 in `generator_scaling`: Ray Serve then gives each replica its own."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; auto: bfloat16 on a GPU, float32 on a CPU."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """Bits of the large matrices, on a CPU: int8 for speed, int4 for memory."""
    stuck_after_s: Positive = 30.0
    """A step that takes longer makes the replica unhealthy, and Ray Serve replaces it."""

    @model_validator(mode="after")
    def _quantized_on_a_cpu(self) -> "GeneratorSettings":
        if self.quantize != "none" and (self.device != "cpu" or self.dtype == "bfloat16"):
            raise ValueError(f"quantize {self.quantize}: is for a CPU, from float32; leave it out, or device and dtype")
        return self


class Scaling(Section):
    """Replicas of one deployment: a fixed number, or between two numbers by load."""

    min_replicas: Count = 1
    max_replicas: Count = 1
    target_ongoing_requests: Positive = 12.0
    """Requests in progress per replica that autoscaling aims at."""
    num_cpus: Annotated[float, Field(ge=0)] = 0.5
    """Reserved of the cluster per replica."""
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    max_surge_percent: Annotated[int, Field(ge=0, le=100)] = 100
    """Extra replicas during an update: with 100 the new ones are up before the old ones go, so that nobody waits;
    0 where there is no room for them (GPUs): old ones go first."""


class Browse(Section):
    """What callers may learn about users, beside what is predicted for the one that they name."""

    users: bool | None = None
    """Whether `/v1/users` lists users; None: only while no API key is needed."""
    exclude_seen: bool = True
    """Whether recommendations may leave out what the user has reviewed. What is missing at the top of such a list was
    reviewed: false where callers must not learn even that."""


class Withhold(Section):
    """Texts that are not sent: the answer has finish_reason "withheld" in place of a text."""

    single_author: bool = False
    """Withhold a text that is, word for word, a training text which exactly one user wrote, other than the user whom it
    is written for. Texts that differ in a word are sent. Streams then send a text as one piece, at its end, and a text
    is written to its end before it is cut to `max_new_tokens`."""
    least_words: Count = 4
    """Shorter texts are sent: "Great product" tells of nobody, though only one user may have left it at that."""


class ServeArgs(Section):
    """Arguments of the app builder."""

    run: str
    """A run folder, or a stage-2 artifact folder; on a path that all nodes share."""
    limits: Limits = Limits()
    composed: bool = True
    """Router, generator and HTTP are deployments of their own, each with its own scaling. False: one deployment has all
    three, each replica with the whole model, by `generator_scaling`: no calls between processes, which for a small
    model take longer than a text."""
    generator: GeneratorSettings = GeneratorSettings()
    router_scaling: Scaling = Scaling(num_cpus=0.25, target_ongoing_requests=64)
    generator_scaling: Scaling = Scaling()
    ingress_scaling: Scaling = Scaling(num_cpus=0.25, target_ongoing_requests=128)
    api_key_hashes: tuple[str, ...] = ()
    """SHA-256 of each accepted key, in hex; with none and no file, everyone may ask."""
    api_keys_file: str | None = None
    """A file with a key's hash a line, perhaps with name, limits and expiry (`serving.keys`); read again when it
    changes."""
    no_api_keys: bool = False
    """Everyone may ask: said explicitly, so that no key is asked for though the environment may hold some."""
    browse: Browse = Browse()
    withhold: Withhold = Withhold()
    allowed_origins: tuple[str, ...] = ()
    """Other sites whose pages may call the interface; none by default."""
    page: bool = True
    """Serve the page at / and the documentation at /docs."""

    @field_validator("api_key_hashes")
    @classmethod
    def _hex(cls, hashes: tuple[str, ...]) -> tuple[str, ...]:
        for value in hashes:
            if not re.fullmatch("[0-9a-f]{64}", value):
                raise ValueError("expected the SHA-256 of a key in 64 hex digits, never the key itself")
            if value == EMPTY_KEY_HASH:
                raise ValueError("holds the hash of an empty key; was a variable unset?")
        return hashes

    @model_validator(mode="after")
    def _keys_or_none(self) -> "ServeArgs":
        if self.no_api_keys and (self.api_key_hashes or self.api_keys_file is not None):
            raise ValueError("no_api_keys: can't be true beside api_key_hashes or api_keys_file")
        return self

    @model_validator(mode="after")
    def _gpu_or_none(self) -> "ServeArgs":
        if (self.generator.device == "cuda") != (self.generator_scaling.num_gpus > 0):
            raise ValueError(
                "generator.device: cuda and generator_scaling.num_gpus above 0 go together: Ray Serve gives a replica"
                " the GPUs that it reserves"
            )
        return self

    @property
    def artifact(self) -> Path:
        """The stage-2 folder of `run`.

        Raises:
            InputError: it is a run of a baseline.
        """
        path = Path(self.run)
        if (path / "baseline").is_dir():
            raise InputError(f"{path}: is a run of a baseline; only GaVaMoE's are served")
        return path / "stage2" if (path / "stage2").is_dir() else path

    @property
    def reserved_cpus(self) -> float:
        """CPUs that the replicas reserve at most."""
        others = (self.router_scaling, self.ingress_scaling) if self.composed else ()
        parts = (self.generator_scaling, *others)
        return sum(part.num_cpus * part.max_replicas for part in parts)


def hash_key(key: str) -> str:
    """SHA-256 of an API key. Keys are long random strings, so that a fast hash is enough."""
    return hashlib.sha256(key.encode()).hexdigest()
