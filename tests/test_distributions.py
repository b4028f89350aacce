"""Likelihoods against scipy's, parameters at the limits of their domains, and scaling."""

import numpy as np
import pytest
import torch
from scipy import stats

from dlref.tasks.distributions import Beta, Deterministic, Gaussian, NegativeBinomial, StudentT, gamma, poisson

COUNTS = [0.0, 1.0, 7.0, 400.0]
REAL = [-3.0, 0.0, 2.5, 1e4]
SHARES = [0.001, 0.3, 0.5, 0.999]


def negative_binomial(mean, shape):
    return stats.nbinom(1 / shape, 1 / (1 + mean * shape))


@pytest.mark.parametrize(
    ("distribution", "theirs", "values"),
    [
        (StudentT(), lambda df, loc, scale: stats.t(df, loc, scale), REAL),
        (Gaussian(), stats.norm, REAL),
        (NegativeBinomial(), negative_binomial, COUNTS),
        (Beta(), stats.beta, SHARES),
        (Deterministic(), stats.laplace, REAL),
    ],
    ids=lambda case: type(case).__name__ if hasattr(case, "parameters") else "",
)
def test_log_likelihoods_match_scipy(distribution, theirs, values):
    raw = torch.randn(len(values), distribution.parameters, dtype=torch.float64)
    scale = torch.tensor([0.5, 1.0, 20.0, 3000.0], dtype=torch.float64)
    parameters = distribution.domain(raw, scale)
    found = distribution.log_prob(torch.tensor(values, dtype=torch.float64), parameters)
    reference = theirs(*(parameter.numpy() for parameter in parameters))
    expected = (
        reference.logpmf(values) if hasattr(reference, "logpmf") and values is COUNTS else reference.logpdf(values)
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("distribution", "raw", "expected"),
    [
        (StudentT(), [0.0, 0.5, 0.0], [2 + np.log(2), 2.0, 4 * np.log(2)]),
        (Gaussian(), [0.5, 0.0], [2.0, 4 * np.log(2)]),
        (Beta(), [0.0, 0.0], [np.log(2), np.log(2)]),
        (Deterministic(), [0.5], [2.0, 4.0]),
    ],
)
def test_parameters_at_a_scale_of_four_match_values_computed_by_hand(distribution, raw, expected):
    """log(1 + exp(0)) = log 2."""
    parameters = distribution.domain(torch.tensor([raw]), torch.tensor([4.0]))
    assert torch.cat(parameters).tolist() == pytest.approx(expected, rel=1e-5)


def test_negative_binomial_has_the_mean_and_variance_of_the_paper():
    raw, scale = torch.zeros(2, 2), torch.tensor([4.0, 100.0])
    mean, shape = NegativeBinomial().domain(raw, scale)
    np.testing.assert_allclose(mean, np.log(2) * scale.numpy(), rtol=1e-5)
    np.testing.assert_allclose(shape, np.log(2) / scale.sqrt().numpy(), rtol=1e-5)
    theirs = negative_binomial(mean.double().numpy(), shape.double().numpy())
    np.testing.assert_allclose(theirs.mean(), mean, rtol=1e-5)
    np.testing.assert_allclose(theirs.var(), mean + mean**2 * shape, rtol=1e-5)


def test_nearly_poisson_negative_binomial_likelihood_is_accurate_in_float32():
    """Two lgammas of about 1e8 nearly cancel: in float32 their difference was off by 25 nats here."""
    raw, scale = torch.tensor([[0.5, -15.0]]), torch.tensor([10_000.0])
    parameters = NegativeBinomial().domain(raw, scale)
    found = NegativeBinomial().log_prob(torch.tensor([9_800.0]), parameters)
    reference = negative_binomial(*(parameter.double().numpy() for parameter in parameters))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, reference.logpmf([9800]), rtol=1e-5)


def test_student_t_has_at_least_two_degrees_of_freedom():
    freedom, *_ = StudentT().domain(torch.full((1, 3), -50.0), torch.ones(1))
    assert freedom >= 2


@pytest.mark.parametrize(
    ("distribution", "values", "supported"),
    [
        (NegativeBinomial(), [0.0, 7.0], True),
        (NegativeBinomial(), [0.0, 0.5], False),
        (NegativeBinomial(), [-1.0], False),
        (Beta(), [0.0, 1.0], True),
        (Beta(), [0.5, 1.5], False),
    ],
)
def test_supports_is_false_if_any_value_is_outside_the_support(distribution, values, supported):
    assert distribution.supports(torch.tensor(values)) is supported


@pytest.mark.parametrize("distribution", [StudentT(), Gaussian(), NegativeBinomial(), Beta(), Deterministic()])
def test_extreme_network_outputs_have_a_finite_likelihood_and_gradient(distribution):
    raw = torch.tensor([-80.0, -5.0, 0.0, 5.0, 80.0])[:, None].repeat(1, distribution.parameters).requires_grad_()
    value = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    likelihood = distribution.log_prob(value, distribution.domain(raw, torch.ones(5)))
    likelihood.sum().backward()
    assert likelihood.isfinite().all()
    assert raw.grad.isfinite().all()


@pytest.mark.parametrize("factor", [1e-22, 1000.0, 1e20])
@pytest.mark.parametrize("distribution", [StudentT(), Gaussian(), Deterministic()])
def test_log_likelihood_of_rescaled_values_differs_by_the_log_of_the_factor(distribution, factor):
    """Also for values whose squares are beyond float32."""
    raw, values = torch.randn(6, distribution.parameters), torch.randn(6)
    one = distribution.log_prob(values, distribution.domain(raw, torch.ones(6)))
    rescaled = distribution.log_prob(factor * values, distribution.domain(raw, torch.full((6,), factor)))
    torch.testing.assert_close(rescaled + np.log(factor), one, rtol=1e-4, atol=1e-4)


DRAWS = 40_000
CASES = [
    (StudentT(), [0.0, 0.5, 0.0], 3.0, lambda df, loc, scale: stats.t(df, loc, scale)),
    (StudentT(), [-5.0, 1.0, 0.0], 3.0, lambda df, loc, scale: stats.t(df, loc, scale)),
    (Gaussian(), [1.0, 0.0], 3.0, stats.norm),
    (Beta(), [0.0, 0.0], 1.0, stats.beta),
    (Beta(), [2.0, 5.0], 1.0, stats.beta),
    (NegativeBinomial(), [0.0, 0.0], 1.0, negative_binomial),  # few
    (NegativeBinomial(), [3.5, -9.0], 8.5, negative_binomial),  # around the mean from which draws are rounded
    (NegativeBinomial(), [2.0, 3.0], 100.0, negative_binomial),  # many
]


@pytest.mark.parametrize(("distribution", "raw", "scale", "theirs"), CASES, ids=range(len(CASES)))
def test_samples_follow_scipys_distribution(distribution, raw, scale, theirs):
    """The largest error of the empirical distribution stays below a bound that 1 in 10,000 samples would exceed."""
    parameters = distribution.domain(torch.tensor(raw).expand(DRAWS, -1), torch.full((DRAWS,), scale))
    drawn = distribution.sample(parameters, torch.rand(DRAWS, distribution.uniforms)).numpy()
    values, counts = np.unique(drawn, return_counts=True)
    reference = theirs(*(parameter[0].item() for parameter in parameters))
    assert np.abs(reference.cdf(values) - np.cumsum(counts) / DRAWS).max() < 2.23 / np.sqrt(DRAWS)


@pytest.mark.parametrize("distribution", [StudentT(), Gaussian(), NegativeBinomial(), Beta(), Deterministic()])
def test_samples_from_noise_of_zero_are_finite(distribution):
    parameters = distribution.domain(torch.zeros(1, distribution.parameters), torch.ones(1))
    assert distribution.sample(parameters, torch.zeros(1, distribution.uniforms)).isfinite().all()


def test_a_rejected_gamma_try_is_replaced_by_a_later_one():
    noise = torch.full((2, 9), 0.5)
    noise[:, 0], noise[:, 1] = 1e-6, 0.0  # a first try of 5.3, far out
    noise[0, 4], noise[1, 4] = 0.999, 1e-7  # ... rejected in one row, accepted in the other
    refused, taken = gamma(torch.full((2,), 0.1), noise)
    assert refused < taken


def test_each_gamma_try_is_accepted_by_its_own_uniform_number():
    """The first try is rejected; the second, equally far out, is accepted or rejected by its own number.

    The last number is that of the power.
    """
    noise = torch.full((4, 9), 0.5, dtype=torch.float64)
    noise[:, 0], noise[:, 1] = 1e-6, 0.125  # two tries of 3.7
    noise[:, 4], noise[:, 5] = 0.999, torch.tensor([1e-9, 0.999, 1e-9, 1e-9], dtype=torch.float64)
    noise[2, 7], noise[3, 8] = 0.25, 0.25
    taken, refused, other, power = gamma(torch.full((4,), 0.1, dtype=torch.float64), noise)
    assert refused < taken - 1
    assert other == taken
    assert power.item() == pytest.approx(taken.item() + np.log(0.5) / 0.1)


@pytest.mark.parametrize(("mean", "apart"), [(5.0, 0), (29.9, 0), (31.0, 1), (50.0, 1), (75.0, 1), (300.0, 1)])
def test_poisson_counts_match_scipys_quantiles(mean, apart):
    normal = torch.linspace(-3, 3, 61, dtype=torch.float64)
    expected = stats.poisson(mean).ppf(stats.norm.cdf(normal.numpy()))
    assert np.abs(poisson(torch.full((61,), mean, dtype=torch.float64), normal).numpy() - expected).max() <= apart


def test_poisson_counts_stay_plausible_at_extreme_noise():
    """Probabilities in float32 add up to less than 1; noise beyond their sum must not give an impossible count."""
    normal = torch.tensor([4.8, 5.0, 5.3])
    assert poisson(torch.full((3,), 29.9), normal).max() < 70
    assert poisson(torch.full((3,), 29.9), -normal).min() >= 4


def test_deterministic_samples_equal_the_value():
    drawn = Deterministic().sample((torch.tensor([[2.0]]), torch.ones(1, 1)), torch.rand(3, 5, 0))
    assert drawn.tolist() == [[2.0] * 5] * 3


@pytest.mark.parametrize("first", [1e4, 1e6, 1e7])
def test_beta_likelihood_is_accurate_at_large_concentrations(first):
    """float32 loses the last digits of large concentrations."""
    second = 0.3 * first
    found = Beta().log_prob(torch.tensor([0.77]), (torch.tensor([first]), torch.tensor([second])))
    value = torch.tensor(0.77).double().item()
    parameters = (torch.tensor(c).double().item() for c in (first, second))
    assert found.item() == pytest.approx(stats.beta.logpdf(value, *parameters), abs=1e-3)
