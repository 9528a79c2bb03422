"""Explanations from a trained model, for `explain`, `evaluate`, `tune` and, through `serving.writing`, the service.

Inputs: a stage-2 folder, which is complete in itself, and requests by index (`catalog` maps raw ids).
Outputs: one `Explanation` per request, in order. How to run:
`ExplanationGenerator.load(folder).explain(requests, generation)`, or `.stream(...)` for the texts piece by piece.

Texts are written by `decoding_engine`, the same wherever they are asked for: greedy ones always, sampled ones for the
same seed. Beam search alone, which knows its text only at the end, is transformers' `generate`.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gavamoe.artifacts.manifest import read_manifest
from gavamoe.config.schema import GenerationConfig
from gavamoe.errors import InputError
from gavamoe.generation.decoding_engine import Engine, Row
from gavamoe.generation.detokenize import TextStream, clean_text
from gavamoe.generation.placement import writing_dtype
from gavamoe.generation.prompts import PromptBuilder, PromptColumns, left_padded
from gavamoe.generation.request import ExplanationRequest, FilledRequest, RequestFiller
from gavamoe.generation.sampling import Sampling
from gavamoe.model.base_model import special_ids
from gavamoe.model.build import load_explainer
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.model.quantized import Quantization, quantize

JOIN_PARTS = 4
"""New texts are begun when one in so many slots is free."""


@dataclass(frozen=True)
class Explanation:
    """A text and everything that went into it."""

    text: str
    """May be empty, if the model wrote nothing: it is kept and counted, never dropped."""
    cluster: int
    responsibilities: tuple[float, ...]
    """(K,) of Eq. 8."""
    rating: float | None
    """The rating whose sentiment word the prompt held; None for implicit data."""
    rating_given: bool
    predicted_rating: float | None
    """Stage 1's expectation, off the scale's grid; the probability of interaction for implicit data. None: a baseline
    that predicts none."""
    features: tuple[str, ...]
    """The features that the prompt named, as far as they fitted."""
    features_given: bool
    user_known: bool
    item_known: bool
    new_tokens: int
    """Tokens written, the end of text included."""


@dataclass(frozen=True)
class Piece:
    """A chunk of a text that is streamed."""

    row: int
    """Which of the requests it belongs to."""
    text: str
    explanation: Explanation | None
    """The whole explanation, with a row's last piece, which may be empty; its text is what the pieces add up to."""


@dataclass(frozen=True)
class Prepared:
    """N requests with all that they left out, and their prompts."""

    requests: list[FilledRequest]
    prompts: list[list[int]]
    """Token ids."""

    @property
    def clusters(self) -> np.ndarray:
        """int64 (N,)."""
        return np.array([request.cluster for request in self.requests], dtype=np.int64)


class ExplanationGenerator:
    """A trained model, ready to explain."""

    def __init__(self, model: GavamoeForCausalLM, tokenizer: PreTrainedTokenizerBase, filler: RequestFiller) -> None:
        self.filler, self.catalog, self.spec, self.device = filler, filler.catalog, filler.spec, filler.device
        self.model = model.to(self.device).eval()
        self.tokenizer = tokenizer
        self.builder = PromptBuilder(tokenizer, model.slots, self.spec.prompt, self.spec.scale)

    @classmethod
    def load(
        cls,
        folder: Path,
        device: str = "cpu",
        dtype: str = "auto",
        bits: Quantization = "none",
        verify: bool | Literal["once"] = True,
    ) -> "ExplanationGenerator":
        """Read a stage-2 artifact onto a torch device, its weights in `dtype` (see `placement.writing_dtype`), its
        large matrices in `bits` (see `model.quantized`); `verify` as in `read_manifest`.

        Raises:
            InputError: it is missing, of another kind, damaged or not whole; or it can't be quantized there.
        """
        read_manifest(folder, "stage2", verify=verify)
        filler = RequestFiller.load(folder, device)
        model, tokenizer = load_explainer(folder, writing_dtype(dtype, device), device)
        generator = cls(model, tokenizer, filler)
        quantize(generator.model, bits)
        return generator

    def explain(
        self,
        requests: Sequence[ExplanationRequest],
        generation: GenerationConfig,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Explanation]:
        """One explanation per request, in their order.

        Args:
            seed: sampled texts depend on it: row i draws by `seed` + i, whatever rows are written beside it.
            on_progress: called with requests done and requests in all, whenever some were finished.

        Raises:
            InputError: a rating off the scale, or one for a model of data without ratings, or a prompt that leaves no
                room for the text.
        """
        if not requests:
            return []
        prepared = self._checked(self.prepare(requests), generation)
        write = self._beam_search if generation.beams > 1 else self._decode
        tokens: dict[int, list[int]] = {}
        for finished in write(prepared, generation, seed):
            tokens |= finished
            if on_progress is not None and finished:
                on_progress(len(tokens), len(requests))
        return [self._explanation(prepared.requests[row], tokens[row]) for row in range(len(requests))]

    def stream(
        self, requests: Sequence[ExplanationRequest], generation: GenerationConfig, seed: int = 0
    ) -> Iterator[Piece]:
        """The texts of `explain` piece by piece, `generation.batch_size` of them growing at the same time.

        Raises:
            InputError: at once, as in `explain`; beam search, which knows its text only at the end.
        """
        if generation.beams > 1:
            raise InputError(f"generation.beams {generation.beams}: beam search can't be streamed; set 1")
        if not requests:
            return iter(())
        return self._pieces(self._checked(self.prepare(requests), generation), generation, seed)

    def prepare(self, requests: Sequence[ExplanationRequest]) -> Prepared:
        """What the model reads for N requests, with all that was not given filled in; raises as `explain` does."""
        filled = self.filler.fill(requests)
        return Prepared(filled, self.prompts(filled))

    def prompts(self, requests: Sequence[FilledRequest]) -> list[list[int]]:
        """Token ids of the prompts."""
        columns = PromptColumns(
            users=[filled.request.user for filled in requests],
            items=[filled.request.item for filled in requests],
            ratings=[filled.rating for filled in requests],
            expected=[filled.predicted_rating if filled.request.rating is None else None for filled in requests],
            features=[filled.features for filled in requests],
            titles=[filled.title for filled in requests],
            quotes=[filled.quotes for filled in requests],
        )
        return self.builder.prompts(columns)

    def route(self, filled: FilledRequest) -> int | tuple[float, ...]:
        """What the model is told of a request's gates: the cluster, or with soft routes the responsibilities."""
        return filled.responsibilities if self.model.config.soft_routes else filled.cluster

    def cluster_ids(self, requests: Sequence[FilledRequest]) -> Tensor:
        """What the model takes as `cluster_ids` beside the prompts of N requests: int64 (N,), or float32 (N, K)."""
        return torch.tensor([self.route(filled) for filled in requests])

    def engine(self, *, slots: int, capacity: int, max_waiting: int, prefill_rows: int, join_rows: int = 1) -> Engine:
        """A decoding engine over this model, which writes no special token but the end; see `Engine`."""
        end = self.builder.end
        forbidden = sorted(special_ids(self.tokenizer) - {end})
        return Engine(
            self.model,
            end,
            forbidden,
            slots=slots,
            capacity=capacity,
            max_waiting=max_waiting,
            prefill_rows=prefill_rows,
            join_rows=join_rows,
            prefix=self.builder.start,
        )

    def text(self, tokens: list[int]) -> str:
        """The text of written tokens: without special tokens, on one line."""
        return clean_text(self.tokenizer, tokens)

    def _checked(self, prepared: Prepared, generation: GenerationConfig) -> Prepared:
        """Refuse prompts that leave no room for the new tokens, rather than cut them."""
        longest, positions = max(map(len, prepared.prompts)), self.model.config.text_config.max_position_embeddings
        if longest + generation.max_new_tokens > positions:
            raise InputError(
                f"generation.max_new_tokens {generation.max_new_tokens}: after a prompt of {longest} tokens that is"
                f" more than the {positions} positions of this model; at most {positions - longest}"
            )
        return prepared

    def _explanation(self, filled: FilledRequest, tokens: list[int]) -> Explanation:
        return Explanation(
            text=self.text(tokens),
            cluster=filled.cluster,
            responsibilities=filled.responsibilities,
            rating=filled.rating,
            rating_given=filled.request.rating is not None,
            predicted_rating=filled.predicted_rating,
            features=filled.features,
            features_given=filled.request.features is not None,
            user_known=filled.user_known,
            item_known=filled.item_known,
            new_tokens=len(tokens),
        )

    def _steps(self, prepared: Prepared, generation: GenerationConfig, seed: int) -> Iterator[list[tuple[int, Row]]]:
        """Steps of the engine until every text is written: the rows that got a token, with their place in `prepared`.

        Rows of similar length join together, since a prefill is as wide as its longest prompt.
        """
        rows = [
            Row(prompt, self.route(filled), sampling_of(generation, seed + place))
            for place, (prompt, filled) in enumerate(zip(prepared.prompts, prepared.requests, strict=True))
        ]
        place_of = {id(row): place for place, row in enumerate(rows)}
        slots = min(len(rows), generation.batch_size)
        engine = self.engine(
            slots=slots,
            capacity=max(map(len, prepared.prompts)) + generation.max_new_tokens,
            max_waiting=len(rows),
            prefill_rows=slots,
            join_rows=max(slots // JOIN_PARTS, 1),
        )
        for row in sorted(rows, key=lambda row: len(row.prompt)):
            engine.submit(row)
        while engine.busy:
            yield [(place_of[id(row)], row) for row in engine.step()]

    def _decode(self, prepared: Prepared, generation: GenerationConfig, seed: int) -> Iterator[dict[int, list[int]]]:
        """The tokens of each row, step by step, as rows are finished."""
        for step in self._steps(prepared, generation, seed):
            yield {place: row.tokens for place, row in step if row.done}

    def _pieces(self, prepared: Prepared, generation: GenerationConfig, seed: int) -> Iterator[Piece]:
        streams = [TextStream(self.tokenizer) for _ in prepared.prompts]
        for step in self._steps(prepared, generation, seed):
            for place, row in step:
                text = streams[place].piece(row.tokens, last=row.done)
                explanation = self._explanation(prepared.requests[place], row.tokens) if row.done else None
                if text or explanation:
                    yield Piece(place, text, explanation)

    def _beam_search(
        self, prepared: Prepared, generation: GenerationConfig, seed: int
    ) -> Iterator[dict[int, list[int]]]:
        """The tokens of each row, batch by batch of similar length."""
        order = sorted(range(len(prepared.prompts)), key=lambda row: len(prepared.prompts[row]))
        options, clusters = self._beam_options(generation), self.cluster_ids(prepared.requests)
        with torch.random.fork_rng(devices=[self.device] if self.device != "cpu" else []):
            torch.manual_seed(seed)
            for start in range(0, len(order), generation.batch_size):
                rows = order[start : start + generation.batch_size]
                prompts = [prepared.prompts[row] for row in rows]
                texts = self._beam_batch(prompts, clusters[rows], options)
                yield dict(zip(rows, texts, strict=True))

    @torch.inference_mode()
    def _beam_batch(
        self, prompts: list[list[int]], clusters: Tensor, options: transformers.GenerationConfig
    ) -> Iterable[list[int]]:
        ids_BT, mask_BT = left_padded(prompts, options.pad_token_id)
        options, processors = _text_only(options, ids_BT.shape[1])
        output_BT = self.model.generate(
            torch.from_numpy(ids_BT).to(self.device),
            attention_mask=torch.from_numpy(mask_BT).to(self.device),
            cluster_ids=clusters.to(self.device),
            generation_config=options,
            logits_processor=processors,
        )
        end = self.builder.end
        for tokens in output_BT[:, ids_BT.shape[1] :].tolist():  # behind a row's end is padding to the longest
            yield tokens[: tokens.index(end) + 1] if end in tokens else tokens

    def _beam_options(self, generation: GenerationConfig) -> transformers.GenerationConfig:
        """Our settings in transformers' words. Special tokens, other than the end, can't be written."""
        sampled = {"temperature": generation.temperature, "top_p": generation.top_p, "top_k": 0}
        end, pad = self.builder.end, self.tokenizer.pad_token_id
        return transformers.GenerationConfig(
            max_new_tokens=generation.max_new_tokens,
            do_sample=generation.temperature > 0,
            num_beams=generation.beams,
            no_repeat_ngram_size=generation.no_repeat_ngram,
            repetition_penalty=generation.repetition_penalty,
            min_new_tokens=generation.min_new_tokens or None,
            suppress_tokens=sorted(special_ids(self.tokenizer) - {end}) or None,
            eos_token_id=end,
            pad_token_id=end if pad is None else pad,
            **(sampled if generation.temperature > 0 else {}),
        )


def _text_only(
    options: transformers.GenerationConfig, prompt_tokens: int
) -> tuple[transformers.GenerationConfig, transformers.LogitsProcessorList]:
    """What keeps n-grams from being repeated reads the text alone, where transformers' own reads the prompt too: a
    prompt's title may well be named, or a review that it quotes."""
    processors = transformers.LogitsProcessorList()
    if options.no_repeat_ngram_size:
        ban = transformers.NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size)
        processors.append(lambda ids, scores: ban(ids[:, prompt_tokens:], scores))
        options = copy.copy(options)
        options.no_repeat_ngram_size = 0
    return options, processors


def sampling_of(generation: GenerationConfig, seed: int) -> Sampling:
    """The config's settings as those of one row."""
    return Sampling(
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        top_p=generation.top_p,
        seed=seed,
        no_repeat_ngram=generation.no_repeat_ngram,
        repetition_penalty=generation.repetition_penalty,
        min_new_tokens=generation.min_new_tokens,
    )
