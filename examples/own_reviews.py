"""From a CSV file of reviews to an explanation: prepare the data, train both stages, explain one pair.

    python examples/own_reviews.py                                   # the small file beside this script
    python examples/own_reviews.py mine.csv --user ann --item teapot --run-dir runs/mine

The file needs a column for users and one for items; ratings and texts are what makes it worthwhile. Say in COLUMNS
which of your columns is which. Prints the size of the dataset, what training reached, and the explanation.
Takes about two minutes on two cores, most of it the start of the workers.
"""

import argparse
from pathlib import Path

import gavamoe
from gavamoe.data.prepare import prepare

COLUMNS = {"user": "reviewer", "item": "product", "rating": "stars", "text": "comment"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path, nargs="?", default=Path(__file__).with_name("reviews.csv"))
    parser.add_argument("--user", default="U000001")
    parser.add_argument("--item", default="I000001")
    parser.add_argument("--config", default="quickstart", help="a preset's name or a YAML file")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/own_reviews"))
    options = parser.parse_args(arguments)

    # 1. Reviews become a dataset folder: ids, splits, and the features that the texts talk about.
    folder = options.run_dir / "dataset"
    if folder.exists():
        print(f"{folder} is kept as it is; take another --run-dir for other reviews")
    else:
        prepare(options.csv, folder, "table", columns=COLUMNS)
    dataset = gavamoe.open_dataset(folder)
    print(f"{dataset.size('train')} training rows of {dataset.meta.users} users and {dataset.meta.items} items")

    # 2. Stage 1 learns ratings and clusters, stage 2 learns to write. `resume` keeps what is already trained.
    config = gavamoe.load_config(options.config)
    metrics = gavamoe.train_run(config, folder, options.run_dir, resume=True)
    print(f"rating RMSE {metrics['stage1']['test']['rmse']:.2f}, text loss {metrics['stage2']['validation_loss']:.2f}")

    # 3. The model works with indices; its catalog translates ids. Unknown ids get the index past the last one.
    generator = gavamoe.ExplanationGenerator.load(options.run_dir / "stage2")
    user, item = generator.catalog.user_index(options.user), generator.catalog.item_index(options.item)
    request = gavamoe.ExplanationRequest(
        user=generator.catalog.n_users if user is None else user,
        item=generator.catalog.n_items if item is None else item,
    )
    [explanation] = generator.explain([request], config.generation)
    print(f"{options.user}, {options.item}: rating {explanation.predicted_rating:.1f}, cluster {explanation.cluster}")
    print(explanation.text)


if __name__ == "__main__":
    main()
