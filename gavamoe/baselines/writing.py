"""A trained baseline's folder `baseline/`, and texts from it: a writer for `evaluate` and `explain`.

The folder is complete in itself: spec, weights, tokenizer, catalog, prompt settings, metrics. Texts are greedy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from gavamoe.artifacts.files import read_json, write_folder, write_json
from gavamoe.artifacts.manifest import load_weights, read_manifest, save_weights, write_manifest
from gavamoe.baselines.frame import Baseline, Columns, Limits, Reader, Spec, Written
from gavamoe.baselines.registry import find_baseline
from gavamoe.config.schema import GenerationConfig, RunConfig
from gavamoe.data.catalog import Catalog
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError, validated
from gavamoe.evaluation.reference_scores import BiasModel
from gavamoe.generation.artifact import CATALOG_FOLDER, PROMPT_FILE, read_prompt_spec
from gavamoe.generation.detokenize import clean_text
from gavamoe.generation.evidence.pair_features import PairFeatures
from gavamoe.generation.generator import Explanation
from gavamoe.generation.prompts import PromptSpec
from gavamoe.generation.request import ExplanationRequest
from gavamoe.model.base_model import special_ids
from gavamoe.runtime.progress import OnProgress
from gavamoe.stage2.tokenized_rows import usual_features

SPEC_FILE, WEIGHTS_FILE, TOKENIZER, METRICS_FILE = "spec.json", "weights.safetensors", "tokenizer", "metrics.json"
SYSTEM = "system"
"""Name of the system in the manifest's details."""


def write_artifact(
    out: Path, config: RunConfig, data: Dataset, model: Baseline, reader: Reader, metrics: dict[str, Any]
) -> None:
    """Write the folder `out`, whole."""
    prompt = PromptSpec(
        prompt=config.stage2.prompt,
        scale=reader.scale,
        usual_features=usual_features(data, config.stage2.prompt.max_features),
    )
    with write_folder(out) as aside:
        write_json(aside / SPEC_FILE, model.spec.model_dump(mode="json"))
        save_weights(aside / WEIGHTS_FILE, model)
        model.save_more(aside)
        reader.tokenizer.save_pretrained(aside / TOKENIZER)
        data.catalog.save(aside / CATALOG_FOLDER)
        if model.spec.features:
            PairFeatures.read(data).save(aside)
            if model.asks_rating and not data.implicit:
                train = data.arrays("train")
                BiasModel.fit(train, data.catalog.known_users, data.catalog.known_items).save(aside)
        write_json(aside / PROMPT_FILE, prompt.model_dump(mode="json"))
        write_json(aside / METRICS_FILE, metrics)
        write_manifest(aside, "baseline", config, {"dataset": data.fingerprint}, {SYSTEM: config.system})


class BaselineWriter:
    """Writes texts with a trained baseline; the interface of `ExplanationGenerator.explain`."""

    def __init__(
        self,
        model: Baseline,
        reader: Reader,
        catalog: Catalog,
        prompt: PromptSpec,
        features: PairFeatures | None,
        bias: BiasModel | None,
        device: str,
    ) -> None:
        """What is asked where a request says nothing.

        Args:
            features: None, as in artifacts of before: the item's usual ones are named.
            bias: None, as in those and for systems that are asked no rating: none is.
        """
        self.model, self.reader, self.catalog = model.to(device).eval(), reader, catalog
        self._prompt, self._features, self._bias, self._device = prompt, features, bias, device

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "BaselineWriter":
        """Read the artifact onto a torch device.

        Raises:
            InputError: missing, of another kind, damaged, or of a system that is not known here.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, "baseline")
        entry = find_baseline(str(manifest.details.get(SYSTEM)))
        kind = entry.load()
        spec: Spec = validated(kind.spec_type, read_json(folder / SPEC_FILE), folder / SPEC_FILE, f"a {entry.label}")
        model = kind.build(spec)
        load_weights(folder / WEIGHTS_FILE, model)
        model.load_more(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER, trust_remote_code=False, local_files_only=True)
        prompt = read_prompt_spec(folder)
        reader = Reader(tokenizer, prompt.prompt, prompt.scale)
        catalog = Catalog.load(folder / CATALOG_FOLDER)
        features, bias = PairFeatures.load(folder, catalog, clusters=1), BiasModel.load(folder, catalog)
        return cls(model, reader, catalog, prompt, features, bias, device)

    def explain(
        self,
        requests: Sequence[ExplanationRequest],
        generation: GenerationConfig,
        seed: int = 0,
        on_progress: OnProgress | None = None,
    ) -> list[Explanation]:
        """One text per request, in their order, greedy: temperature, beams and seed are not used.

        Raises:
            InputError: a rating off the scale or of data without ratings, or a history, which baselines can't use.
        """
        del seed
        features = [self._checked(request) for request in requests]
        spec = self.model.spec
        columns = Columns(
            users=np.array([min(request.user, spec.n_users) for request in requests], dtype=np.int64),
            items=np.array([min(request.item, spec.n_items) for request in requests], dtype=np.int64),
            ratings=np.array([np.nan if r.rating is None else r.rating for r in requests], dtype=np.float32),
            features=features,
            titles=[self.catalog.item_title(request.item) for request in requests],
        )
        asked = self._asked_ratings(columns)
        prefixes = self.model.prefixes(replace(columns, ratings=asked), self.reader)
        end = self.reader.end
        limits = Limits(
            longest=generation.max_new_tokens,
            end=end,
            banned=sorted(special_ids(self.reader.tokenizer) - {end}),
            no_repeat_ngram=generation.no_repeat_ngram,
            repetition_penalty=generation.repetition_penalty,
            shortest=generation.min_new_tokens,
        )
        explanations: dict[int, Explanation] = {}
        for batch in self._batches(prefixes, generation.batch_size):
            written = self._write(columns, prefixes, batch, limits)
            for place, row in enumerate(batch):
                predicted = None if written.ratings is None else written.ratings[place]
                filled = predicted if np.isnan(asked[row]) else float(asked[row])
                explanations[row] = self._explanation(
                    requests[row], features[row], written.tokens[place], predicted, filled
                )
            if on_progress:
                on_progress(len(explanations), len(requests))
        return [explanations[row] for row in range(len(requests))]

    def check(self, request: ExplanationRequest) -> None:
        """Raise InputError for a request that `explain` would refuse."""
        self._checked(request)

    @torch.inference_mode()
    def _write(
        self, columns: Columns, prefixes: Sequence[Sequence[int]], rows: Sequence[int], limits: Limits
    ) -> Written:
        chosen = {"users": columns.users, "items": columns.items, "ratings": columns.ratings}
        batch = {name: torch.from_numpy(values[list(rows)]).to(self._device) for name, values in chosen.items()}
        return self.model.write(batch, [prefixes[row] for row in rows], limits)

    def _checked(self, request: ExplanationRequest) -> tuple[str, ...]:
        """The features that a request's text is to speak of."""
        if request.history:
            raise InputError("history: a baseline knows nothing of strangers; leave it out")
        if request.rating is not None:
            if self._prompt.scale is None:
                raise InputError(f"rating {request.rating:g}: this model's dataset has no ratings; leave it out")
            self._prompt.scale.check(request.rating)
        if not self.model.spec.features:
            return ()
        if request.features is None:
            count = self._prompt.usual_features
            if self._features is None:
                return self.catalog.usual_features(request.user, request.item, count)
            return self._features.rank(request.user, request.item, [1.0], count)
        return request.features[: self._prompt.prompt.max_features]

    def _asked_ratings(self, columns: Columns) -> np.ndarray:
        """The ratings (N,) that prefixes may read: those given; for the others the bias model's, if it is kept."""
        if self._bias is None:
            return columns.ratings
        predicted = self._bias.predict(columns.users, columns.items).astype(np.float32)
        return np.where(np.isnan(columns.ratings), predicted, columns.ratings)

    def _batches(self, prefixes: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
        """Rows of similar length together; of equal length, where the baseline needs that."""
        batch: list[int] = []
        for row in sorted(range(len(prefixes)), key=lambda row: len(prefixes[row])):
            other = self.model.equally_long and batch and len(prefixes[batch[0]]) != len(prefixes[row])
            if batch and (other or len(batch) == size):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _explanation(
        self,
        request: ExplanationRequest,
        features: tuple[str, ...],
        tokens: list[int],
        predicted: float | None,
        asked: float | None,
    ) -> Explanation:
        """`predicted`: by the system; `asked`: the rating that the text is to agree with; None: there is none."""
        scale = self._prompt.scale
        usual = None if scale is None or asked is None else scale.nearest(asked)
        return Explanation(
            text=clean_text(self.reader.tokenizer, tokens),
            cluster=0,
            responsibilities=(1.0,),
            rating=usual if request.rating is None else request.rating,
            rating_given=request.rating is not None,
            predicted_rating=predicted,
            features=features,
            features_given=request.features is not None,
            user_known=0 <= request.user < self.catalog.known_users,
            item_known=0 <= request.item < self.catalog.known_items,
            new_tokens=len(tokens),
        )
