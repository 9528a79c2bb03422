"""Explanations from a trained model: the only way text is made, for evaluation and serving alike.

Inputs: a stage-2 folder, which is complete in itself, and requests by index (`catalog` maps raw ids).
Outputs: one `Explanation` per request, in order. How to run:
`ExplanationGenerator.load(folder).explain(requests, generation)`, or `.stream(...)` for the texts as they
are written, piece by piece.

Stage 1 routes each pair and predicts its rating in one pass. A rating that is not given is that prediction, moved to
the nearest rating of the scale; features that are not given are the item's usual ones.

Shape letters: B rows of a batch, T tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from gavamoe.artifacts.files import read_json
from gavamoe.artifacts.manifest import read_manifest
from gavamoe.config.schema import GenerationConfig
from gavamoe.data.catalog import Catalog
from gavamoe.errors import InputError
from gavamoe.generation.decoding_engine import Engine, Row
from gavamoe.generation.detokenize import TextStream, clean_text
from gavamoe.generation.prompts import PromptBuilder, PromptColumns, PromptSpec, left_padded
from gavamoe.generation.request import ExplanationRequest
from gavamoe.generation.sampling import Sampling
from gavamoe.model.base_model import special_ids
from gavamoe.model.build import load_explainer
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.stage1.artifact import load_vae_gmm
from gavamoe.stage1.route_overrides import RouteControl
from gavamoe.stage1.routes import Routes, route_pairs
from gavamoe.stage1.vae_gmm import VaeGmm

CATALOG_FOLDER = "catalog"
PROMPT_FILE = "prompt.json"


@dataclass(frozen=True)
class Explanation:
    """A text and everything that went into it."""

    text: str
    """May be empty, if the model wrote nothing: it is kept and counted, never dropped."""
    cluster: int
    responsibilities: tuple[float, ...]
    """(K,) of Eq. 8."""
    rating: float | None
    """Whose sentiment word the prompt held; None for implicit data."""
    rating_given: bool
    predicted_rating: float
    """Stage 1's expectation, off the scale's grid; the probability of interaction for implicit data."""
    features: tuple[str, ...]
    """Named in the prompt, as far as they fitted."""
    features_given: bool
    user_known: bool
    item_known: bool
    new_tokens: int
    """Tokens written, the end of text included."""


@dataclass(frozen=True)
class Piece:
    """What a text has grown by."""

    row: int
    """Of the requests."""
    text: str
    explanation: Explanation | None
    """With a row's last piece, which may be empty: the whole, whose text its pieces add up to."""


@dataclass(frozen=True)
class Prepared:
    """N requests, their prompts, and what went into them."""

    requests: Sequence[ExplanationRequest]
    prompts: list[list[int]]
    """Token ids."""
    routes: Routes
    ratings: list[float | None]
    features: list[tuple[str, ...]]


@dataclass(frozen=True)
class _Writing:
    """What the language model made of one prompt."""

    text: str
    new_tokens: int


class ExplanationGenerator:
    """A trained model, ready to explain."""

    def __init__(
        self,
        model: GavamoeForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        vae_gmm: VaeGmm,
        catalog: Catalog,
        spec: PromptSpec,
        device: str = "cpu",
        control: RouteControl | None = None,
    ) -> None:
        """`control` routes in stage 1's place."""
        self.control = control
        self.model = model.to(device).eval()
        self.tokenizer, self.catalog, self.spec, self.device = tokenizer, catalog, spec, device
        self.vae_gmm = vae_gmm.to(device).eval()
        self.builder = PromptBuilder(tokenizer, model.user_token, model.item_token, spec.prompt, spec.scale)

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "ExplanationGenerator":
        """Read a stage-2 artifact.

        Raises:
            InputError: it is missing, of another kind, damaged or not whole.
        """
        folder = Path(folder)
        read_manifest(folder, "stage2")
        try:
            spec = PromptSpec.model_validate(read_json(folder / PROMPT_FILE))
        except ValidationError as error:
            raise InputError(
                f"{folder / PROMPT_FILE}: not a prompt description ({error.error_count()} problems)"
            ) from error
        model, tokenizer = load_explainer(folder)
        catalog, control = Catalog.load(folder / CATALOG_FOLDER), RouteControl.load(folder)
        return cls(model, tokenizer, load_vae_gmm(folder), catalog, spec, device, control)

    def routes(self, users: np.ndarray, items: np.ndarray) -> Routes:
        """Where pairs go, by index: (N,) int64 each."""
        routes = route_pairs(self.vae_gmm, users, items, device=self.device)
        return routes if self.control is None else self.control.apply(routes, users, items)

    def explain(
        self,
        requests: Sequence[ExplanationRequest],
        generation: GenerationConfig,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Explanation]:
        """One explanation per request, in their order.

        Args:
            seed: of sampling; greedy and beam search don't use it.
            on_progress: called after each batch with requests done and requests in all.

        Raises:
            InputError: a rating off the scale, or one for a model of data without ratings.
        """
        if not requests:
            return []
        prepared = self._checked(self.prepare(requests), generation)
        written = self._write(prepared.prompts, prepared.routes.cluster, generation, seed, on_progress)
        return [self._explanation(prepared, row, writing) for row, writing in enumerate(written)]

    def stream(
        self, requests: Sequence[ExplanationRequest], generation: GenerationConfig, seed: int = 0
    ) -> Iterator[Piece]:
        """The texts piece by piece, `generation.batch_size` of them growing at the same time.

        Greedy texts are those of `explain`. Sampled ones are those of `gavamoe serve`, not of `explain`: row i is
        drawn by `seed` + i, whatever rows are written beside it.

        Raises:
            InputError: at once, as in `explain`; beam search, which knows its text only at the end.
        """
        if generation.beams > 1:
            raise InputError(f"generation.beams {generation.beams}: beam search can't be streamed; set 1")
        if not requests:
            return iter(())
        return self._pieces(self._checked(self.prepare(requests), generation), generation, seed)

    def _pieces(self, prepared: Prepared, generation: GenerationConfig, seed: int) -> Iterator[Piece]:
        rows = [
            Row(prompt, int(prepared.routes.cluster[index]), _sampling(generation, seed + index))
            for index, prompt in enumerate(prepared.prompts)
        ]
        place = {id(row): index for index, row in enumerate(rows)}
        streams = [TextStream(self.tokenizer) for _ in rows]
        end = self.builder.end
        engine = Engine(
            self.model,
            end,
            sorted(special_ids(self.tokenizer) - {end}),
            slots=min(len(rows), generation.batch_size),
            capacity=max(map(len, prepared.prompts)) + generation.max_new_tokens,
            max_waiting=len(rows),
        )
        for row in rows:
            engine.submit(row)
        while engine.busy:
            for row in engine.step():
                index = place[id(row)]
                text = streams[index].piece(row.tokens, last=row.done)
                writing = _Writing(clean_text(self.tokenizer, row.tokens), len(row.tokens)) if row.done else None
                if text or writing:
                    yield Piece(index, text, self._explanation(prepared, index, writing) if writing else None)

    def prepare(self, requests: Sequence[ExplanationRequest]) -> Prepared:
        """What the model reads for N requests, with all that was not given filled in; raises as `explain` does."""
        users = np.array([request.user for request in requests], dtype=np.int64)
        items = np.array([request.item for request in requests], dtype=np.int64)
        routes = self.routes(users, items)
        ratings = [prompt_rating(self.spec, r.rating, float(routes.rating[row])) for row, r in enumerate(requests)]
        features = [prompt_features(self.spec, self.catalog, r.user, r.item, r.features) for r in requests]
        titles = [self.catalog.item_title(request.item) for request in requests]
        prompts = self.builder.prompts(PromptColumns(users.tolist(), items.tolist(), ratings, features, titles))
        return Prepared(requests, prompts, routes, ratings, features)

    def _checked(self, prepared: Prepared, generation: GenerationConfig) -> Prepared:
        """Refuse prompts that leave no room for the new tokens, rather than cut them."""
        longest, positions = max(map(len, prepared.prompts)), self.model.config.text_config.max_position_embeddings
        if longest + generation.max_new_tokens > positions:
            raise InputError(
                f"generation.max_new_tokens {generation.max_new_tokens}: after a prompt of {longest} tokens that is"
                f" more than the {positions} positions of this model; at most {positions - longest}"
            )
        return prepared

    def _explanation(self, prepared: Prepared, row: int, written: _Writing) -> Explanation:
        request, routes = prepared.requests[row], prepared.routes
        return Explanation(
            text=written.text,
            cluster=int(routes.cluster[row]),
            responsibilities=tuple(map(float, routes.responsibilities[row])),
            rating=prepared.ratings[row],
            rating_given=request.rating is not None,
            predicted_rating=float(routes.rating[row]),
            features=prepared.features[row],
            features_given=request.features is not None,
            user_known=0 <= request.user < self.catalog.known_users,
            item_known=0 <= request.item < self.catalog.known_items,
            new_tokens=written.new_tokens,
        )

    def _write(
        self,
        prompts: list[list[int]],
        cluster_N: np.ndarray,
        generation: GenerationConfig,
        seed: int,
        on_progress: Callable[[int, int], None] | None,
    ) -> list[_Writing]:
        """Decode all prompts in batches of similar length; the results are in the order of `prompts`."""
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        options = self._options(generation)
        written: dict[int, _Writing] = {}
        devices = [self.device] if self.device != "cpu" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for start in range(0, len(order), generation.batch_size):
                rows = order[start : start + generation.batch_size]
                batch = self._write_batch([prompts[row] for row in rows], cluster_N[rows], options)
                written.update(zip(rows, batch, strict=True))
                if on_progress is not None:
                    on_progress(len(written), len(prompts))
        return [written[row] for row in range(len(prompts))]

    @torch.inference_mode()
    def _write_batch(
        self, prompts: list[list[int]], cluster_B: np.ndarray, options: transformers.GenerationConfig
    ) -> list[_Writing]:
        ids_BT, mask_BT = left_padded(prompts, options.pad_token_id)
        output_BT = self.model.generate(
            torch.from_numpy(ids_BT).to(self.device),
            attention_mask=torch.from_numpy(mask_BT).to(self.device),
            cluster_ids=torch.from_numpy(cluster_B.astype(np.int64)).to(self.device),
            generation_config=options,
        )
        answers = [self._until_end(row) for row in output_BT[:, ids_BT.shape[1] :].tolist()]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [_Writing(" ".join(text.split()), len(answer)) for text, answer in zip(texts, answers, strict=True)]

    def _until_end(self, tokens: list[int]) -> list[int]:
        """A row's own tokens, its end of text included; what follows is padding to the batch's longest."""
        end = self.builder.end
        return tokens[: tokens.index(end) + 1] if end in tokens else tokens

    def _options(self, generation: GenerationConfig) -> transformers.GenerationConfig:
        """Our settings in transformers' words. Special tokens, other than the end, can't be written."""
        sampling = {"temperature": generation.temperature, "top_p": generation.top_p, "top_k": 0}
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
            **(sampling if generation.temperature > 0 else {}),
        )


def prompt_rating(spec: PromptSpec, given: float | None, predicted: float) -> float | None:
    """The rating whose sentiment a prompt says: as given, else stage 1's; None for data without ratings.

    Raises:
        InputError: one off the scale, or one for a model of data without ratings.
    """
    if given is None:
        return None if spec.scale is None else spec.scale.nearest(predicted)
    if spec.scale is None:
        raise InputError(f"rating {given:g}: this model's dataset has no ratings; leave it out")
    spec.scale.check(given)
    return given


def prompt_features(
    spec: PromptSpec, catalog: Catalog, user: int, item: int, given: Sequence[str] | None
) -> tuple[str, ...]:
    """The features that a prompt names: as given, else the item's usual ones; none where prompts name no features."""
    if not spec.prompt.features:
        return ()
    if given is not None:
        return tuple(given[: spec.prompt.max_features])
    return catalog.usual_features(user, item, spec.usual_features)


def _sampling(generation: GenerationConfig, seed: int) -> Sampling:
    return Sampling(
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        top_p=generation.top_p,
        seed=seed,
        no_repeat_ngram=generation.no_repeat_ngram,
        repetition_penalty=generation.repetition_penalty,
        min_new_tokens=generation.min_new_tokens,
    )
