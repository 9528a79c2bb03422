"""API keys: names, limits, expiry; read from a file that may change while the service runs.

A line of the file is `[NAME] sha256:HEX [in_flight=N] [per_minute=N] [expires=YYYY-MM-DD]`; # begins a comment.
"""

import hmac
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from gavamoe.errors import InputError
from gavamoe.serving.settings import EMPTY_KEY_HASH, LOG_NAME, Limits, ServeArgs, hash_key

KEYS_VARIABLE = "GAVAMOE_API_KEYS"
"""Environment variable with accepted keys, separated by commas."""
SHORT_KEY = 16
"""Characters below which a key can be guessed from its hash, or by asking."""
POLL_S = 1.0
"""Seconds between two looks at the file of keys."""

_log = logging.getLogger(LOG_NAME)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_HASH = re.compile(r"[0-9a-f]{64}")
_FORM = "[NAME] sha256:HEX [in_flight=N] [per_minute=N] [expires=YYYY-MM-DD]"


class LimitReached(Exception):
    """A key has used up what it may ask for now."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Key:
    """One accepted key; of the key itself only its hash is known."""

    name: str
    """What logs call it."""
    digest: str
    in_flight: int | None = None
    """Requests that it may have in progress, per ingress replica; None: no limit of its own."""
    per_minute: int | None = None
    """Requests a minute, per ingress replica; None: no limit of its own."""
    expires: date | None = None
    """The last day, in UTC, on which it is accepted."""

    def expired(self, now: datetime) -> bool:
        """Whether its last day is over."""
        return self.expires is not None and now.date() > self.expires


@dataclass
class _Use:
    """What a key does at the moment. Kept by hash, so that a reload of the file does not forget it."""

    in_flight: int = 0
    tokens: float = math.inf
    """Requests that it may still begin in this minute; refilled steadily."""
    since: float = field(default_factory=time.monotonic)


class ApiKeys:
    """The accepted keys, as hashes only."""

    def __init__(self, read: Callable[[], list[Key]], limits: Limits, file: Path | None = None) -> None:
        """Read the keys.

        Args:
            read: gives all keys; called again when `file` has changed.
        """
        self._read, self._limits, self._file = read, limits, file
        self._seen, self._looked = self._stamp(), time.monotonic()
        self._keys = read()
        self._use: dict[str, _Use] = {}

    @classmethod
    def read(cls, args: ServeArgs) -> "ApiKeys":
        """From the arguments, their file and the environment.

        Raises:
            InputError: the file is missing, holds no key, or has a line that is not one; a key is empty, or the
                variable is set and holds none. Each of these would lock everyone out or, worse, let everyone in.
        """
        file = None if args.api_keys_file is None else Path(args.api_keys_file)

        def every() -> list[Key]:
            if args.no_api_keys:
                return []
            keys = [_unnamed(digest) for digest in args.api_key_hashes]
            keys += [] if file is None else read_keys(file)
            return keys + [_unnamed(hash_key(key)) for key in environment_keys()]

        return cls(every, args.limits, file)

    @property
    def required(self) -> bool:
        """Whether a key must be shown."""
        return bool(self._keys)

    def find(self, shown: str | None) -> Key | None:
        """The key that was shown, if it is accepted; takes the same time for every wrong one."""
        self._reload()
        if not shown:
            return None
        digest = hash_key(shown)
        found = [key for key in self._keys if hmac.compare_digest(digest, key.digest)]
        now = datetime.now(UTC)
        return next((key for key in found if not key.expired(now)), None)

    def enter(self, key: Key) -> None:
        """Count a request of this key in; `leave` counts it out.

        Raises:
            LimitReached: it has as many in progress, or began as many in a minute, as it may.
        """
        use = self._use.setdefault(key.digest, _Use())
        in_flight = key.in_flight or self._limits.key_in_flight
        if in_flight is not None and use.in_flight >= in_flight:
            raise LimitReached(f"this key may have {in_flight} requests in progress", self._limits.retry_after_s)
        per_minute = key.per_minute or self._limits.key_per_minute
        if per_minute is not None:
            now = time.monotonic()
            use.tokens = min(per_minute, use.tokens + (now - use.since) * per_minute / 60)
            use.since = now
            if use.tokens < 1:
                wait = math.ceil((1 - use.tokens) * 60 / per_minute)
                raise LimitReached(f"this key may ask {per_minute} times a minute", wait)
            use.tokens -= 1
        use.in_flight += 1

    def leave(self, key: Key) -> None:
        """The end of a request that entered."""
        self._use[key.digest].in_flight -= 1

    def _reload(self) -> None:
        """Take a changed file in; of one that is wrong or gone, say so and keep what was read before."""
        now = time.monotonic()
        if self._file is None or now - self._looked < POLL_S:
            return
        self._looked = now
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._keys = self._read()
        except InputError as error:
            _log.error("API keys were not read again, and those read before stay: %s", error)
        else:
            _log.warning("API keys were read again: %s", ", ".join(key.name for key in self._keys))

    def _stamp(self) -> tuple[int, int, int] | None:
        """Changes when the file does: also when another one takes its name, as a mounted Secret does."""
        try:
            found = os.stat(self._file) if self._file is not None else None
        except OSError:
            return None
        return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)


def environment_keys() -> list[str]:
    """The keys of GAVAMOE_API_KEYS.

    Raises:
        InputError: it is set and holds an empty key, as an unset variable within it would leave one.
    """
    if KEYS_VARIABLE not in os.environ:
        return []
    keys = [key.strip() for key in os.environ[KEYS_VARIABLE].split(",")]
    if not all(keys):
        raise InputError(f"{KEYS_VARIABLE}: holds an empty key; without any, unset it")
    return keys


def warnings_about(args: ServeArgs) -> list[str]:
    """What should be said about the keys when a service starts, a line each."""
    if args.no_api_keys:
        return []
    short = sum(len(key) < SHORT_KEY for key in environment_keys())
    found = [f"{KEYS_VARIABLE}: {short} of its keys are shorter than {SHORT_KEY} characters"] if short else []
    now = datetime.now(UTC)
    keys = [] if args.api_keys_file is None else read_keys(Path(args.api_keys_file))
    return found + [
        f"{args.api_keys_file}: the key {key.name} expired on {key.expires}" for key in keys if key.expired(now)
    ]


def read_keys(path: Path) -> list[Key]:
    """The keys of a file.

    Raises:
        InputError: it can't be read, holds none, or has a line that is not one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: API keys can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: API keys can't be read (not UTF-8 text)") from error
    keys = [_key(words, f"{path}, line {number}") for number, words in _words(lines)]
    if not keys:
        raise InputError(f"{path}: holds no key; without any, leave the option out")
    for what in ("name", "digest"):
        values = [str(getattr(key, what)) for key in keys]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            shown = twice if what == "name" else f"sha256:{twice[:8]}…"
            raise InputError(f"{path}: {shown} is given twice")
    return keys


def _words(lines: Iterable[str]) -> list[tuple[int, list[str]]]:
    split = [(number, line.split("#")[0].split()) for number, line in enumerate(lines, 1)]
    return [(number, words) for number, words in split if words]


def _key(words: list[str], where: str) -> Key:
    """One line's key; the line itself is not repeated in errors, as it may hold the key in plain."""
    name = None
    if _digest(words[0]) is None and len(words) > 1 and _NAME.fullmatch(words[0]):
        name, *words = words
    digest = _digest(words[0])
    if digest is None:
        raise InputError(f"{where}: expected sha256: and 64 hex digits, never the key itself: {_FORM}")
    if digest == EMPTY_KEY_HASH:
        raise InputError(f"{where}: that is the hash of an empty key; was a variable unset?")
    options: dict[str, str] = {}
    for word in words[1:]:
        option, _, value = word.partition("=")
        if option in options or option not in ("in_flight", "per_minute", "expires"):
            raise InputError(f"{where}: expected each of in_flight=, per_minute= and expires= at most once: {_FORM}")
        options[option] = value
    return Key(
        name or _unnamed(digest).name,
        digest,
        _count(options, "in_flight", where),
        _count(options, "per_minute", where),
        _last_day(options.get("expires"), where),
    )


def _digest(word: str) -> str | None:
    value = word.removeprefix("sha256:")
    return value if _HASH.fullmatch(value) else None


def _unnamed(digest: str) -> Key:
    return Key(f"key-{digest[:8]}", digest)


def _count(options: dict[str, str], name: str, where: str) -> int | None:
    value = options.get(name)
    if value is None:
        return None
    if not re.fullmatch("[1-9][0-9]{0,8}", value):
        raise InputError(f"{where}: {name}={value[:20]!r}: expected a whole number from 1")
    return int(value)


def _last_day(value: str | None, where: str) -> date | None:
    if value is None:
        return None
    try:
        return date.fromisoformat(value)
    except ValueError as error:
        tomorrow = datetime.now(UTC).date() + timedelta(days=1)
        raise InputError(f"{where}: expires={value[:20]!r}: expected a day such as {tomorrow}") from error
