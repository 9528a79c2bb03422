"""What `gavamoe route` and `gavamoe explain` print: clusters, one pair's route, one explanation."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gavamoe.cli.terminal import console, print_json, print_table

if TYPE_CHECKING:  # torch takes seconds to import, and most commands need none
    from gavamoe.experiments.cluster_sweep import Sweep
    from gavamoe.generation.generator import Explanation
    from gavamoe.stage1.clusters import Cluster


def print_clusters(clusters: "Sequence[Cluster]", metrics: Mapping[str, Any], picture: Path, *, as_json: bool) -> None:
    """What each cluster is, how many there are in effect, what they tell of texts, and where the latent map lies.

    Args:
        metrics: stage 1's metrics.json.
    """
    from gavamoe.stage1.validation import idle_gates

    effective, told = metrics.get("effective_clusters"), metrics.get("information")
    if as_json:
        described = [cluster.model_dump(mode="json") for cluster in clusters]
        print_json({"clusters": described, "effective_clusters": effective, "information": told})
    for cluster in clusters:
        number, *cells = cluster.row()
        print_table(f"Cluster {number}", ["", ""], zip(cluster.labels(), cells, strict=True))
    if effective is not None:
        console.print(f"effective clusters: {effective:.2f} of {len(clusters)}", markup=False)
    if told is not None:
        low, high = told["interval"]
        console.print(
            f"they tell {told['nats']:.4f} nats a word ({low:.4f} to {high:.4f}) of held-out texts, beyond clusters"
            f" drawn at random per user; {told['words']:,} words",
            markup=False,
            soft_wrap=True,
        )
    for problem in idle_gates(metrics, len(clusters)):
        console.print(f"warning: {problem}", markup=False, soft_wrap=True)
    console.print(f"latent map: {picture}", markup=False, soft_wrap=True)


def print_cluster_sweep(sweep: "Sweep", picture: Path, *, as_json: bool) -> None:
    """One row per number of clusters, and which to take."""
    if as_json:
        print_json(sweep.model_dump(mode="json"))
    columns = ["clusters", "valid ELBO", "reconstruction", "RMSE", "smallest cluster", "stability (ARI)", "seconds"]
    planted = sweep.rows[0].user_ari is not None
    rows = [
        (str(r.clusters), r.elbo, r.reconstruction, r.rmse, f"{r.smallest_share:.1%}", r.stability, round(r.seconds))
        + ((r.user_ari,) if planted else ())
        for r in sweep.rows
    ]
    print_table("Stage 1 by number of clusters", columns + (["planted groups (ARI)"] if planted else []), rows)
    console.print(f"recommended: {sweep.recommended} clusters, {sweep.reason}", markup=False, soft_wrap=True)
    console.print(f"rule: {sweep.rule}", markup=False, soft_wrap=True)
    console.print(f"plot: {picture}", markup=False, soft_wrap=True)


def print_route(route: dict[str, Any], *, as_json: bool) -> None:
    """The route of one pair."""
    if as_json:
        print_json(route)
    print_table("Route of one pair", ["", ""], [(name, _text(value)) for name, value in route.items()])
    _print_unknown(route["user_known"], route["item_known"])


def print_explanation(
    value: "Explanation", user: str | None, item: str, *, history: int, shown: bool, as_json: bool
) -> None:
    """The text on standard output, unless it was `shown` as it was written; how it came about on standard error.

    `history`: entries by which the user was routed.
    """
    if as_json:
        print_json({"user": user, "item": item, "history_entries": history} | asdict(value))
        return
    print("" if shown else value.text)
    _print_unknown(value.user_known or history > 0, value.item_known)
    if history:
        console.print(f"user routed by {history} {'entry' if history == 1 else 'entries'} of history", markup=False)
    if len(value.responsibilities) > 1:
        shares = ", ".join(f"{share:.2f}" for share in value.responsibilities)
        console.print(f"cluster {value.cluster} (responsibilities {shares})", markup=False)
    if value.rating is not None:
        origin = "given" if value.rating_given else f"predicted as {value.predicted_rating:.2f}"
        console.print(f"rating {value.rating:.3g} ({origin})", markup=False)
    if value.features:
        origin = "given" if value.features_given else "the likely ones"
        console.print(f"features {', '.join(value.features)} ({origin})", markup=False)


def _print_unknown(user_known: bool, item_known: bool) -> None:
    for kind, known in (("user", user_known), ("item", item_known)):
        if not known:
            console.print(f"{kind} not seen in training: the unknown-{kind} embedding is used", markup=False)


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(f"{number:.3f}" for number in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)
