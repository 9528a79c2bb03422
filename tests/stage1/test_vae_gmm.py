"""Stage 1's mathematics: the bound against Monte Carlo, the mixture against scikit-learn, batches that don't mix."""

import math

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_stage1
from sklearn.mixture import GaussianMixture

from gavamoe.config.schema import Stage1Config
from gavamoe.errors import InputError
from gavamoe.stage1.artifact import load_vae_gmm, save_vae_gmm
from gavamoe.stage1.vae_gmm import Dropout, Likelihood, MixturePrior, PairLayer, VaeGmm

STARS = (1.0, 2.0, 3.0, 4.0, 5.0)
SAMPLES = 100_000


def small_config(**changes: object) -> Stage1Config:
    return tiny_stage1(**{"encoder_feedforward": 24} | changes).stage1


def small_model(likelihood: Likelihood = "categorical", values: tuple[float, ...] = STARS, **changes: object) -> VaeGmm:
    """A model with a spread-out mixture, so that no responsibility is trivial."""
    torch.manual_seed(0)
    model = VaeGmm(small_config(**changes), 30, 20, likelihood, values).eval()
    with torch.no_grad():
        for table in (model.user_embedding, model.item_embedding):
            table.weight.mul_(50)
        overlap = (4 / model.config.latent_size) ** 0.5  # as far apart, in all, at any latent size
        model.prior.means.normal_(std=0.7 * overlap)
        model.prior.raw_log_variances.normal_(std=0.4 * overlap)
        model.prior.logits.normal_()
    return model


def some_pairs(count: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    user, item = (torch.randint(0, high, (count,), generator=generator) for high in (30, 20))
    return user, item, torch.randint(1, 6, (count,), generator=generator).float()


def within(found: float, samples: torch.Tensor, errors: float = 3.0) -> bool:
    """Whether a value lies within some standard errors of a Monte Carlo mean."""
    return abs(found - samples.mean().item()) < errors * samples.std().item() / math.sqrt(len(samples))


@pytest.mark.parametrize("latent_size", [2, 32, 128])
def test_terms_equal_monte_carlo(latent_size: int) -> None:
    """Each expectation over q(z, c|x), with c drawn from gamma, against 10^5 samples of z and c."""
    model = small_model(latent_size=latent_size).double()
    generator = torch.Generator().manual_seed(2)
    mu = torch.randn(1, latent_size, generator=generator, dtype=torch.double) * 0.5
    log_var = torch.randn(1, latent_size, generator=generator, dtype=torch.double) * 0.3 - 1
    anchor = model.sample(mu, log_var, torch.randn(mu.shape, generator=generator, dtype=torch.double))
    terms = model.pair_elbo(mu, log_var, anchor, None, torch.tensor([4.0], dtype=torch.double), beta=1.0)

    noise = torch.randn(SAMPLES, latent_size, generator=generator, dtype=torch.double)
    z = mu + noise * (0.5 * log_var).exp()
    gamma = model.responsibilities(anchor)[0].double()
    c = torch.multinomial(gamma, SAMPLES, replacement=True, generator=generator)
    means, variances = model.prior.means.detach()[c], model.prior.log_variances.detach().double().exp()[c]
    log_p_z = torch.distributions.Normal(means, variances.sqrt()).log_prob(z).sum(-1)
    log_q_z = torch.distributions.Normal(mu, (0.5 * log_var).exp()).log_prob(z).sum(-1)
    log_p_c, log_q_c = model.prior.log_weights.detach().double()[c], gamma.log()[c]
    assert within(terms.log_p_z_given_c.item(), log_p_z)
    assert within(terms.log_q_z.item(), log_q_z)
    assert within(terms.log_p_c.item(), log_p_c)
    assert within(terms.log_q_c.item(), log_q_c)
    assert within(terms.kl.item(), log_q_z + log_q_c - log_p_z - log_p_c)


@pytest.mark.parametrize(("likelihood", "values"), [("categorical", STARS), ("bernoulli", (0.0, 1.0))])
def test_reconstruction_equals_monte_carlo(likelihood: Likelihood, values: tuple[float, ...]) -> None:
    """E[log p(x|z)] by the model's own sampling against torch's distributions on other samples."""
    model = small_model(likelihood, values)
    mu, log_var, rating = torch.randn(1, 4), torch.zeros(1, 4), torch.tensor([values[-1]])
    ours, theirs = (torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6))
    with torch.no_grad():
        z = model.sample(mu, log_var, ours)
        wide = mu.expand_as(z), log_var.expand_as(z)
        found = model.pair_elbo(*wide, z, None, rating.expand(SAMPLES), 1.0).reconstruction
        output = model.decode(mu + theirs, None)
        if likelihood == "categorical":
            expected = torch.distributions.Categorical(logits=output).log_prob(torch.tensor(len(values) - 1))
        else:
            expected = torch.distributions.Bernoulli(logits=output[:, 0]).log_prob(rating)
    error = ((found.var() + expected.var()) / SAMPLES).sqrt()
    assert (found.mean() - expected.mean()).abs() < 3 * error


def test_sample_has_the_posterior_moments() -> None:
    model = small_model()
    mu, log_var = torch.tensor([[1.0, -2.0, 0.0, 3.0]]), torch.tensor([[0.0, -2.0, 1.0, -4.0]])
    noise = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(0))
    z = model.sample(mu, log_var, noise)
    for dimension in range(4):
        assert within(mu[0, dimension].item(), z[:, dimension])
        assert within(log_var[0, dimension].exp().item(), (z[:, dimension] - mu[0, dimension]).square())


def test_one_component_gives_the_gaussian_kl() -> None:
    """K = 1 with a standard normal prior: the textbook KL of a VAE."""
    model = small_model(clusters=1)
    with torch.no_grad():
        model.prior.means.zero_()
        model.prior.raw_log_variances.zero_()
    mu, log_var = model.encode(*some_pairs()[:2])
    terms = model.pair_elbo(mu, log_var, mu, None, some_pairs()[2], beta=0.5)
    expected = 0.5 * (mu.square() + log_var.exp() - log_var - 1).sum(-1)
    torch.testing.assert_close(terms.kl, expected)
    torch.testing.assert_close(terms.loss, 0.5 * expected - terms.reconstruction)


def test_bound_is_below_the_evidence() -> None:
    """log p(x) by importance sampling is at least the ELBO, for every pair."""
    model = small_model()
    user, item, rating = some_pairs(6)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        mu, log_var = model.encode(user, item)
        for row in range(6):
            noise = torch.randn(20_000, 4, generator=generator)
            z = model.sample(mu[row], log_var[row], noise)
            bound = model.pair_elbo(
                mu[row].expand_as(z), log_var[row].expand_as(z), z, None, rating[row].expand(20_000), 1.0
            )
            log_joint = bound.reconstruction + (model.prior.log_weights + model.prior.log_density(z)).logsumexp(-1)
            log_q = torch.distributions.Normal(mu[row], (0.5 * log_var[row]).exp()).log_prob(z).sum(-1)
            evidence = (log_joint - log_q).logsumexp(0) - math.log(20_000)
            assert -bound.loss.mean() <= evidence + 0.02


def test_likelihoods_are_distributions_with_the_predicted_mean() -> None:
    user, item, _ = some_pairs()
    categorical, bernoulli = small_model(), small_model("bernoulli", (0.0, 1.0))
    with torch.no_grad():
        for model, values in ((categorical, STARS), (bernoulli, (0.0, 1.0))):
            output = model.decode(model.encode(user, item)[0], None)
            log_p = torch.stack([model.log_likelihood(output, torch.full((12,), value)) for value in values], dim=1)
            torch.testing.assert_close(log_p.exp().sum(1), torch.ones(12))
            torch.testing.assert_close(log_p.exp() @ torch.tensor(values), model.predict_rating(user, item))


def test_gaussian_likelihood_is_a_density_around_the_prediction() -> None:
    model = small_model("gaussian", (0.0, 10.0))
    user, item, _ = some_pairs(1)
    with torch.no_grad():
        assert model.log_noise is not None
        model.log_noise.fill_(0.7)
        assert model.item_bias is not None
        model.item_bias.uniform_(-0.2, 0.2)
        output = model.decode(model.encode(user, item)[0], model.bias(user, item))
        grid = torch.linspace(-20, 30, 5001)
        density = model.log_likelihood(output.expand(5001, 1), grid).exp()
        assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-4)
        mean = torch.trapezoid(density * grid, grid).item()
        assert mean == pytest.approx(model.predict_rating(user, item).item(), abs=1e-3)


def test_bernoulli_of_ratings_spans_the_scale() -> None:
    model = small_model("bernoulli", (1.0, 5.0))
    output = torch.tensor([[0.0], [40.0], [-40.0]])
    torch.testing.assert_close(model.expected_rating(output), torch.tensor([3.0, 5.0, 1.0]))
    log_p = model.log_likelihood(torch.tensor([[math.log(3)]]), torch.tensor([5.0]))
    assert log_p.item() == pytest.approx(math.log(0.75))


@pytest.mark.parametrize("latent_size", [2, 32, 128, 512])
@pytest.mark.parametrize("spread", [1.0, 1e3])
def test_responsibilities_equal_scikit_learn(latent_size: int, spread: float) -> None:
    """Float32 log-sum-exp against float64, with means up to `spread`; densities underflow in most of these cases."""
    random = np.random.default_rng(latent_size)
    means = random.normal(size=(3, latent_size)) * spread
    variances = random.uniform(0.5, 2.0, size=(3, latent_size))
    weights = np.array([0.7, 0.2, 0.1])
    near = means[random.integers(3, size=200)] + random.normal(size=(200, latent_size))
    between = means.mean(axis=0) + random.normal(size=(50, latent_size)) * spread
    points = np.concatenate([near, between]).astype(np.float32)
    theirs = GaussianMixture(3, covariance_type="diag")
    theirs.weights_, theirs.means_, theirs.covariances_ = weights, means, variances
    theirs.precisions_cholesky_ = 1 / np.sqrt(variances)

    prior = MixturePrior(3, latent_size)
    prior.set(torch.from_numpy(weights), torch.from_numpy(means), torch.from_numpy(variances))
    ours = prior.log_responsibilities(torch.from_numpy(points)).exp().detach()
    assert ours.dtype == torch.float32
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours.sum(1), torch.ones(250))
    expected = theirs.predict_proba(points)
    clear = np.sort(expected, axis=1)[:, -1] > 0.999
    assert (ours.argmax(1).numpy() == expected.argmax(1))[clear].all()
    if spread == 1.0:
        np.testing.assert_allclose(ours.numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4, 1e8])
def test_responsibilities_are_finite_anywhere(scale: float) -> None:
    prior = MixturePrior(3, 128)
    with torch.no_grad():
        prior.means.normal_(std=scale)
        prior.raw_log_variances.fill_(-1e4)
    gamma = prior.log_responsibilities(torch.randn(64, 128) * scale).exp()
    assert torch.isfinite(gamma).all()
    torch.testing.assert_close(gamma.sum(1), torch.ones(64))


def test_mixture_weights_stay_a_distribution() -> None:
    prior = MixturePrior(4, 2)
    with torch.no_grad():
        prior.logits.copy_(torch.tensor([-50.0, 0.0, 3.0, 900.0]))
    assert prior.log_weights.exp().sum().item() == pytest.approx(1)
    assert torch.isfinite(prior.log_weights).all()


def test_a_pair_does_not_see_its_batch() -> None:
    """Permuting, splitting and growing a batch change no latent."""
    model = small_model()
    user, item, _ = some_pairs()
    with torch.no_grad():
        mu, log_var = model.encode(user, item)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(model.encode(user[order], item[order])[0], mu[order], atol=1e-6, rtol=1e-5)
        alone = torch.cat([model.encode(user[i : i + 1], item[i : i + 1])[1] for i in range(12)])
        torch.testing.assert_close(alone, log_var, atol=1e-6, rtol=1e-5)
        grown = model.encode(torch.cat([user, user.flip(0)]), torch.cat([item, item]))[0]
        torch.testing.assert_close(grown[:12], mu, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("queries", [1, 2])
def test_pair_attention_is_softmax_attention(queries: int) -> None:
    """The sigmoid of one score difference against torch's attention over both tokens, with its key bias."""
    torch.manual_seed(0)
    layer = PairLayer(size=12, heads=3, feedforward=8, dropout=0.0).double()
    tokens_BTE = torch.randn(5, 2, 12, dtype=torch.double)
    key_BTE, value_BTE = layer.key_value(tokens_BTE).chunk(2, dim=-1)
    heads = [
        part.unflatten(-1, (3, 4)).transpose(1, 2)
        for part in (layer.query(tokens_BTE[:, :queries]), key_BTE, value_BTE)
    ]
    expected_BQE = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer._attend(tokens_BTE.transpose(0, 1), queries), expected_BQE.transpose(0, 1))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate: float) -> None:
    """Each of the four values of a random word, over 250,000 words: within 5 standard errors."""
    torch.manual_seed(0)
    dropout = Dropout(rate)
    states = torch.ones(1_000_001, requires_grad=True)
    dropped = dropout(states)
    dropped.sum().backward()
    assert torch.equal(states.grad, dropped.detach())
    assert len(dropped.unique()) == 2
    lanes = dropped[:-1].detach().view(-1, 4)
    assert ((lanes == 0).double().mean(dim=0) - rate).abs().max() < 5 * (rate * (1 - rate) / 250_000) ** 0.5
    assert (torch.corrcoef((lanes == 0).double().T) - torch.eye(4)).abs().max() < 5 / 500
    assert dropped.max().item() == pytest.approx(1 / (1 - rate), rel=1e-4)
    assert dropout.eval()(states) is states
    assert Dropout(0.0)(states) is states


def test_user_and_item_both_matter_and_are_told_apart() -> None:
    model = small_model()
    with torch.no_grad():
        base = model.encode(torch.tensor([3]), torch.tensor([5]))[0]
        for other in ((4, 5), (3, 6), (5, 3)):
            changed = model.encode(torch.tensor([other[0]]), torch.tensor([other[1]]))[0]
            assert (changed - base).abs().max() > 1e-3


def test_indices_above_the_known_are_the_unknown_row() -> None:
    model = small_model()
    with torch.no_grad():
        at_row = model.encode(torch.tensor([30]), torch.tensor([20]))[0]
        above = model.encode(torch.tensor([31]), torch.tensor([9999]))[0]
        known = model.encode(torch.tensor([29]), torch.tensor([19]))[0]
    torch.testing.assert_close(at_row, above)
    assert (at_row - known).abs().max() > 1e-3


def test_log_variances_are_bounded() -> None:
    model = small_model()
    with torch.no_grad():
        model.encoder.log_variance.bias.fill_(1e6)
        assert model.encode(*some_pairs()[:2])[1].max() <= 8


def test_elbo_is_repeatable_from_a_generator() -> None:
    model = small_model()
    first, second, other = (model.elbo(*some_pairs(), 0.1, torch.Generator().manual_seed(s)).loss for s in (1, 1, 2))
    assert first == second
    assert first != other


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_every_parameter_gets_a_gradient(likelihood: Likelihood) -> None:
    model = small_model(likelihood)
    model.elbo(*some_pairs(), 0.1, torch.Generator().manual_seed(0)).loss.backward()
    trained = [(name, p) for name, p in model.named_parameters() if not name.endswith("_bias")]
    without = [name for name, p in trained if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_saved_model_is_the_same_model(tmp_path, likelihood: Likelihood) -> None:
    model = small_model(likelihood)
    save_vae_gmm(tmp_path, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vae_gmm.json", "vae_gmm.safetensors"]
    loaded = load_vae_gmm(tmp_path)
    assert loaded.to_spec() == model.to_spec()
    user, item, _ = some_pairs()
    assert torch.equal(loaded.predict_rating(user, item), model.predict_rating(user, item))


def test_damaged_models_are_refused(tmp_path) -> None:
    save_vae_gmm(tmp_path, small_model())
    with pytest.raises(InputError, match=r"vae_gmm\.json: no such file"):
        load_vae_gmm(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    save_vae_gmm(tmp_path / "other", small_model(latent_size=6))
    (tmp_path / "other" / "vae_gmm.safetensors").replace(tmp_path / "vae_gmm.safetensors")
    with pytest.raises(InputError, match="weights do not load"):
        load_vae_gmm(tmp_path)
    (tmp_path / "vae_gmm.json").write_text('{"config": {"clusters": 0}}')
    with pytest.raises(InputError, match="does not describe a VAE-GMM"):
        load_vae_gmm(tmp_path)


def test_a_scale_needs_two_ascending_values() -> None:
    with pytest.raises(ValueError, match="at least two ascending values"):
        VaeGmm(small_config(), 3, 3, "categorical", (5.0, 1.0))
