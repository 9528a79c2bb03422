"""Stage 2 as a service: writes the text of a routed pair, whole or piece by piece, with an engine of its own.

A pair that another version of the artifact has routed (in the middle of a rolling update) is routed anew, so that
cluster, rating and text of an answer always come from one version.
"""

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gavamoe.config.schema import GenerationConfig
from gavamoe.errors import InputError
from gavamoe.generation.artifact import generation_settings
from gavamoe.generation.authorship import SingleAuthors
from gavamoe.generation.decoding_engine import Row, Timings
from gavamoe.generation.detokenize import TextStream
from gavamoe.generation.engine_thread import EngineThread, use_torch_threads
from gavamoe.generation.generator import ExplanationGenerator, sampling_of
from gavamoe.serving.routing import RoutedPair, RoutingService
from gavamoe.serving.settings import GeneratorSettings, Withhold


@dataclass(frozen=True)
class TextRequest:
    """How a text is to be written; None: as the run's config says."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    trace: bool = False


@dataclass(frozen=True)
class Written:
    """A finished text."""

    routed: RoutedPair
    """As it was written: another than was asked for, if it had to be routed anew."""
    text: str
    new_tokens: int
    finish_reason: Literal["end", "length", "withheld"]
    timings: Timings
    experts: list[list[int]] | None


@dataclass(frozen=True)
class Piece:
    """A chunk of a text that is streamed."""

    text: str
    tokens: int
    """Tokens of the text written so far."""


@dataclass(frozen=True)
class WriterInfo:
    """What clients may want to know about the model."""

    model_version: str
    layers: int
    experts: int
    max_new_tokens: int
    """The default."""


class WritingService:
    """Loads the language model and writes; call it on one asyncio loop."""

    def __init__(
        self,
        explainer: ExplanationGenerator,
        folder: Path,
        settings: GeneratorSettings,
        max_new_tokens: int,
        withhold: Withhold = Withhold(),
    ) -> None:
        """`max_new_tokens` is the largest that a request may ask for."""
        self._explainer, self._settings = explainer, settings
        self._router = RoutingService(explainer.filler, folder)
        self.defaults = generation_defaults(folder)
        self._authors = SingleAuthors.load(folder) if withhold.single_author else None
        self._least_words = withhold.least_words
        # What repeats a training text shows only at its end: no text that is compared may be shorter than the model's.
        self._least_tokens = explainer.spec.prompt.max_explanation_tokens if withhold.single_author else 1
        engine = explainer.engine(
            slots=settings.slots,
            capacity=explainer.spec.prompt.max_tokens
            + max(max_new_tokens, self.defaults.max_new_tokens, self._least_tokens),
            max_waiting=settings.max_waiting,
            prefill_rows=settings.prefill_rows,
        )
        self.engine = EngineThread(engine, settings.threads)
        self._end = explainer.builder.end

    @classmethod
    def load(
        cls, folder: Path, settings: GeneratorSettings, max_new_tokens: int, withhold: Withhold = Withhold()
    ) -> "WritingService":
        """Read a stage-2 artifact and start its engine.

        Raises:
            InputError: it is missing, damaged or not whole, its config asks for beam search, or texts are to be
                withheld and it doesn't know their authors.
        """

        def read() -> ExplanationGenerator:
            use_torch_threads(settings.threads)
            # Eight replicas of a machine that start together need not hash 17 GB each.
            return ExplanationGenerator.load(folder, settings.device, settings.dtype, settings.quantize, verify="once")

        # Only the engine's thread may have helpers, for the reason that EngineThread has: who reads is one that ends.
        with ThreadPoolExecutor(max_workers=1) as reader:
            explainer = reader.submit(read).result()
        use_torch_threads(1)
        return cls(explainer, folder, settings, max_new_tokens, withhold)

    @property
    def info(self) -> WriterInfo:
        """About the model."""
        config = self._explainer.model.config
        experts = config.n_experts if config.experts_enabled else 0
        layers = config.text_config.num_hidden_layers
        return WriterInfo(self._router.version, layers, experts, self.defaults.max_new_tokens)

    async def write(self, routed: RoutedPair, request: TextRequest) -> Written:
        """Write the whole text.

        Raises:
            EngineFull: too many wait.
        """
        routed = self._same_version(routed)
        row = self._row(routed, request)
        ticket = self.engine.start(row, each_token=False)
        try:
            async for _ in ticket:
                pass
        finally:
            ticket.close()
        return self._written(routed, request, row)

    async def stream(self, routed: RoutedPair, request: TextRequest) -> AsyncIterator[RoutedPair | Piece | Written]:
        """The route that is written by, then pieces of text, then the finished text, which the pieces add up to; one
        piece where texts may be withheld."""
        routed = self._same_version(routed)
        row = self._row(routed, request)
        pieces = TextStream(self._explainer.tokenizer)
        ticket = self.engine.start(row, each_token=self._authors is None)
        try:
            yield routed
            async for count in ticket:
                if self._authors is not None:
                    continue
                last = row.done and count == len(row.tokens)
                text = pieces.piece(row.tokens[:count], last=last)
                if text:
                    yield Piece(text, count)
        finally:
            ticket.close()
        written = self._written(routed, request, row)
        if self._authors is not None and written.text:
            yield Piece(written.text, written.new_tokens)
        yield written

    def check(self) -> None:
        """Raise RunError if no answer can be expected."""
        self.engine.check(self._settings.stuck_after_s)

    def _same_version(self, routed: RoutedPair) -> RoutedPair:
        if routed.model_version == self._router.version:
            return routed
        return self._router.route([routed.pair])[0]

    def _row(self, routed: RoutedPair, request: TextRequest) -> Row:
        [prompt] = self._explainer.prompts([routed.filled])
        length = max(self._most_tokens(request), self._least_tokens)
        asked = {"max_new_tokens": length, "temperature": request.temperature, "top_p": request.top_p}
        changes = {name: value for name, value in asked.items() if value is not None}
        sampling = sampling_of(self.defaults.model_copy(update=changes), request.seed)
        trace = request.trace and self._explainer.model.config.experts_enabled
        return Row(prompt, self._explainer.route(routed.filled), sampling, trace=trace)

    def _most_tokens(self, request: TextRequest) -> int:
        return self.defaults.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens

    def _written(self, routed: RoutedPair, request: TextRequest, row: Row) -> Written:
        tokens = row.tokens[: self._most_tokens(request)]
        withheld = self._authors is not None and self._authors.another_wrote(
            self._explainer.text(row.tokens), routed.filled.request.user, self._least_words
        )
        return Written(
            routed=routed,
            text="" if withheld else self._explainer.text(tokens),
            new_tokens=len(tokens),
            finish_reason="withheld" if withheld else "end" if tokens[-1] == self._end else "length",
            timings=row.timings,
            experts=None if row.expert_use is None else row.expert_use.tolist(),
        )


def generation_defaults(folder: Path) -> GenerationConfig:
    """The generation settings that the artifact's run was configured with.

    Raises:
        InputError: they ask for beam search.
    """
    defaults = generation_settings(folder)
    if defaults.beams > 1:
        raise InputError(
            f"{folder}: configured with generation.beams={defaults.beams}; a service writes token by token, without"
            " beam search: train with generation.beams=1, or evaluate with it and serve another run"
        )
    return defaults
