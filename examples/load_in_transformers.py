"""A trained explainer through transformers alone: AutoModelForCausalLM, AutoTokenizer and generate().

    python examples/load_in_transformers.py runs/own_reviews/stage2 --user 3 --item 5

The prompt ends where the explanation begins; its constant parts are those that the model was trained on. A user and an
item are one token each, and `cluster_ids` says which gate chooses the experts; ExplanationGenerator does all of it for
you. Prints one text for every gate, so that you see what the gates change; the pair's own gate is the one that stage 1
would choose.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gavamoe  # noqa: F401 - makes the model known to the Auto classes
from gavamoe.generation.prompts import PromptSpec, labels


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the stage2 folder of a run")
    parser.add_argument("--user", type=int, default=0, help="index of the user")
    parser.add_argument("--item", type=int, default=0, help="index of the item")
    parser.add_argument("--rating", choices=["negative", "neutral", "positive"], default="positive")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = AutoModelForCausalLM.from_pretrained(options.folder).eval()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    said = labels(PromptSpec.model_validate_json((options.folder / "prompt.json").read_text()).prompt)
    prompt = [
        *ids(said.instruction), model.user_token(options.user),
        *ids(said.item), model.item_token(options.item),
        *ids(f"{said.rating} {options.rating}"),
        *ids(said.answer),
    ]  # fmt: skip
    gates = model.config.n_gates
    texts = model.generate(
        torch.tensor([prompt] * gates), cluster_ids=torch.arange(gates), max_new_tokens=32, do_sample=False
    )
    for gate, text in enumerate(texts):
        print(f"gate {gate}: {tokenizer.decode(text[len(prompt) :], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
