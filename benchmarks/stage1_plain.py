"""Stage 1 as section 3.2 of the paper says it, with torch's own parts and nothing else: what stage 1 is timed against.

    python -m benchmarks.stage1_plain [--threads 2] [--rounds 5] [--clusters 3 16]

The same shapes as stage 1 at the paper's size: tables of 27,147 users and 20,266 items by 768, two transformer layers
(`nn.TransformerEncoder`, 8 heads) over the two tokens of each pair, 128 latent dimensions, K Gaussians, a decoder of
two layers; squared error, the KL in closed form, Adam over everything, tables included. Plain and own steps of 1,024
pairs take turns in each round; medians, and the ratio of the medians. No feeding, no logs.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.stage1 import BATCH, ITEMS, USERS, paper_size, timed, yelp_size
from gavamoe.config.schema import Stage1Config
from gavamoe.data.dataset import Dataset
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.pair_stream import global_batches
from gavamoe.stage1.trainer import Trainer


class PlainVaeGmm(nn.Module):
    """Equations 1 to 8 and 15, pair by pair in a batch."""

    def __init__(self, config: Stage1Config) -> None:
        super().__init__()
        size, latent = config.embedding_size, config.latent_size
        self.users, self.items = nn.Embedding(USERS, size), nn.Embedding(ITEMS, size)
        layer = nn.TransformerEncoderLayer(
            size, config.encoder_heads, config.encoder_feedforward, config.dropout, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, config.encoder_layers)
        self.mean, self.log_variance = nn.Linear(size, latent), nn.Linear(size, latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, config.decoder_hidden), nn.ReLU(), nn.Linear(config.decoder_hidden, 1)
        )
        self.weights = nn.Parameter(torch.zeros(config.clusters))
        self.means = nn.Parameter(torch.randn(config.clusters, latent))
        self.log_variances = nn.Parameter(torch.zeros(config.clusters, latent))
        self.beta = config.beta

    def forward(self, user_B: Tensor, item_B: Tensor, rating_B: Tensor) -> Tensor:
        """The loss of a batch."""
        encoded_BTE = self.encoder(torch.stack([self.users(user_B), self.items(item_B)], dim=1))
        summary_BE = encoded_BTE.mean(dim=1)
        mu_BL, log_var_BL = self.mean(summary_BE), self.log_variance(summary_BE)
        z_BL = mu_BL + torch.randn_like(mu_BL) * (0.5 * log_var_BL).exp()
        distance_BKL = (z_BL[:, None] - self.means) ** 2 / self.log_variances.exp()
        log_density_BK = -0.5 * (math.log(2 * math.pi) + self.log_variances + distance_BKL).sum(-1)
        log_gamma_BK = (self.weights.log_softmax(0) + log_density_BK).log_softmax(-1)
        gamma_BK = log_gamma_BK.exp()
        spread_BKL = (log_var_BL.exp()[:, None] + (mu_BL[:, None] - self.means) ** 2) / self.log_variances.exp()
        kl_B = 0.5 * (gamma_BK * (self.log_variances + spread_BKL).sum(-1)).sum(-1)
        kl_B = kl_B + (gamma_BK * (log_gamma_BK - self.weights.log_softmax(0))).sum(-1) - 0.5 * (1 + log_var_BL).sum(-1)
        error_B = (self.decoder(z_BL).squeeze(-1) - rating_B) ** 2
        return (error_B + self.beta * kl_B).mean()


def plain_step(config: Stage1Config) -> Callable[[], None]:
    """A step on random pairs."""
    model = PlainVaeGmm(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    draw = torch.Generator().manual_seed(0)

    def step() -> None:
        user_B, item_B = (torch.randint(count, (BATCH,), generator=draw) for count in (USERS, ITEMS))
        rating_B = torch.randint(1, 6, (BATCH,), generator=draw).float()
        optimizer.zero_grad()
        model(user_B, item_B, rating_B).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()

    return step


def own_step(config: Stage1Config, data: Dataset) -> Callable[[], None]:
    """A step of stage 1 on the ELBO, with clusters of users, over random pairs of as many users and items."""
    run = paper_size(clusters=config.clusters)
    trainer = Trainer(run, data, LocalContext())
    shares_UK = np.full((trainer.model.n_users, config.clusters), 1 / config.clusters)
    trainer.user_clusters = trainer._user_clusters(shares_UK, 1.0)
    pairs = trainer.source.epoch(0)
    slices = iter(list(global_batches(pairs.size, BATCH)))
    trainer.model.train()

    def step() -> None:
        rows = next(slices)
        trainer._train_step(pairs, rows, 0.1, torch.randn(rows.stop - rows.start, run.stage1.latent_size))

    return step


def main() -> None:
    """Time both, in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clusters", type=int, nargs="+", default=[3, 16])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        data, steps = yelp_size(Path(folder)), dict[str, Callable[[], None]]()
        for clusters in arguments.clusters:
            config = paper_size(clusters=clusters).stage1
            steps[f"plain, K {clusters}"] = plain_step(config)
            steps[f"stage 1, K {clusters}"] = own_step(config, data)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(arguments.rounds + 1):  # the first warms up
            for name, step in steps.items():
                seconds = timed(step)
                if turn:
                    times[name].append(seconds)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    if arguments.json:
        print(json.dumps(medians, indent=2))
        return
    for name, seconds in medians.items():
        print(f"{name:16} {seconds * 1000:8.1f} ms a step  {BATCH / seconds:8,.0f} pairs/s")
    for clusters in arguments.clusters:
        ratio = medians[f"plain, K {clusters}"] / medians[f"stage 1, K {clusters}"]
        print(f"K {clusters}: stage 1 is {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
