"""Distributions of the values of a series, parameterised by a network's outputs.

Each class maps a network's P outputs to the domains of the parameters, in the units of the series, computes the
log-likelihood of values (with torch's densities, except for two: one waits for the device, the other leaves the range
of float32) and draws a value. A draw is a function of given uniform numbers: the same numbers give the same value in
PyTorch and in an exported graph, which has no random generator and no gamma function.

Legend of shapes: ... any, N values, P parameters of the distribution, U uniform numbers of a draw.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Beta as TorchBeta
from torch.distributions import NegativeBinomial as TorchNegativeBinomial
from torch.nn import functional as F

from dlref.training.devices import widest_float

SMALLEST = 1e-6  # lower bound of positive quantities
TRIES = 4  # for a gamma variable, each accepted with probability 0.951 or more: at most 6 in a million draws reject all
MANY = 30.0  # mean from which a Poisson variable is approximated by a continuous one
COUNTS = 80  # a Poisson variable of a mean below MANY reaches this with a probability of less than one in a trillion


class Distribution:
    """A family of distributions with P `parameters`, whose draws are functions of `uniforms` uniform numbers.

    `smooth` is True if a draw changes continuously with the parameters; a draw that rounds or rejects may jump.
    `support` describes the possible values in words, and `whole_numbers` is True if they are integers.
    """

    parameters: int
    uniforms: int
    smooth = True
    whole_numbers = False
    support = "any numbers"

    def domain(self, raw: Float[Tensor, "*shape P"], scale: Float[Tensor, "*shape"]) -> tuple[Tensor, ...]:
        """Map `raw` to parameters (...) in their domains; `scale` is that of each series."""
        raise NotImplementedError

    def log_prob(self, values: Float[Tensor, "*shape"], parameters: tuple[Tensor, ...]) -> Float[Tensor, "*shape"]:
        """Return the log-likelihood of `values`."""
        raise NotImplementedError

    def sample(self, parameters: tuple[Tensor, ...], noise: Float[Tensor, "*shape U"]) -> Float[Tensor, "*shape"]:
        """Draw a value for each row of `noise`, which is uniform from 0 to 1."""
        raise NotImplementedError

    def supports(self, values: Float[Tensor, "N"]) -> bool:
        """Return whether all `values` have a likelihood."""
        return True


class StudentT(Distribution):
    """Student's t with more than 2 degrees of freedom (finite variance), location and width in units of the scale."""

    parameters = 3
    uniforms = 2

    def domain(self, raw: Float[Tensor, "*shape P"], scale: Float[Tensor, "*shape"]) -> tuple[Tensor, ...]:
        """Return degrees of freedom, location and width."""
        freedom, location, width = raw.unbind(-1)
        return 2 + F.softplus(freedom), location * scale, positive(width) * scale

    def log_prob(self, values: Float[Tensor, "*shape"], parameters: tuple[Tensor, ...]) -> Float[Tensor, "*shape"]:
        """Return the log-likelihood of `values`."""
        freedom, location, width = parameters  # torch's own class waits for the device, to check its arguments
        half = freedom / 2
        constant = (half + 0.5).lgamma() - half.lgamma() - 0.5 * (math.pi * freedom).log() - width.log()
        return constant - (half + 0.5) * (((values - location) / width).square() / freedom).log1p()

    def sample(self, parameters: tuple[Tensor, ...], noise: Float[Tensor, "*shape U"]) -> Float[Tensor, "*shape"]:
        """Draw t = √(ν (u^(-2/ν) - 1)) cos 2πv (R. W. Bailey, "Polar Generation of Random Variates with the
        t-Distribution", 1994). u^(-2/ν) - 1 is computed as a product, to avoid cancellation.
        """
        freedom, location, width = parameters
        share = -uniform(noise[..., 0]).log() / freedom
        radius = (2 * freedom * share.exp() * share.sinh()).sqrt()
        return location + width * radius * (2 * math.pi * noise[..., 1]).cos()


class Gaussian(Distribution):
    """The paper's distribution for real values: mean and standard deviation in units of the scale (section 3.1)."""

    parameters = 2
    uniforms = 2

    def domain(self, raw: Float[Tensor, "*shape P"], scale: Float[Tensor, "*shape"]) -> tuple[Tensor, ...]:
        """Return mean and standard deviation."""
        mean, deviation = raw.unbind(-1)
        return mean * scale, positive(deviation) * scale

    def log_prob(self, values: Float[Tensor, "*shape"], parameters: tuple[Tensor, ...]) -> Float[Tensor, "*shape"]:
        """Return the log-likelihood of `values`."""
        mean, deviation = parameters  # torch's own class squares the deviation, which may leave the range of float32
        return -0.5 * ((values - mean) / deviation).square() - deviation.log() - 0.5 * math.log(2 * math.pi)

    def sample(self, parameters: tuple[Tensor, ...], noise: Float[Tensor, "*shape U"]) -> Float[Tensor, "*shape"]:
        """Draw values by the Box-Muller transform."""
        mean, deviation = parameters
        return mean + deviation * normals(noise[..., 0], noise[..., 1])[0]


class NegativeBinomial(Distribution):
    """The paper's distribution for counts: mean mu, shape alpha, variance mu + mu² alpha (sections 3.1 and 3.3)."""

    parameters = 2
    uniforms = 2 + 2 * TRIES + 1
    smooth = False
    whole_numbers = True
    support = "whole numbers of 0 or more"

    def domain(self, raw: Float[Tensor, "*shape P"], scale: Float[Tensor, "*shape"]) -> tuple[Tensor, ...]:
        """Return mean and shape; the shape is divided by the root of the scale."""
        mean, shape = raw.unbind(-1)
        return positive(mean) * scale, positive(shape) / scale.sqrt()

    def log_prob(self, values: Float[Tensor, "*shape"], parameters: tuple[Tensor, ...]) -> Float[Tensor, "*shape"]:
        """Return the log-likelihood of `values`, whole numbers of 0 or more."""
        # For nearly Poisson counts, two large lgammas almost cancel: float32 has errors of several nats.
        dtype = widest_float(values.device)
        mean, shape = (parameter.to(dtype) for parameter in parameters)
        known = TorchNegativeBinomial(1 / shape, logits=(mean * shape).log(), validate_args=False)
        return known.log_prob(values.to(dtype)).to(parameters[0].dtype)

    def sample(self, parameters: tuple[Tensor, ...], noise: Float[Tensor, "*shape U"]) -> Float[Tensor, "*shape"]:
        """Draw a Poisson variable whose mean is a gamma variable of shape 1/alpha and mean mu."""
        mean, shape = parameters
        rate = mean * shape * gamma(1 / shape, noise[..., 2:]).exp()
        return poisson(rate, normals(noise[..., 0], noise[..., 1])[0])

    def supports(self, values: Float[Tensor, "N"]) -> bool:
        """Return whether all `values` are whole numbers of 0 or more."""
        return bool(((values >= 0) & (values == values.round())).all())


class Beta(Distribution):
    """The beta distribution, for values between 0 and 1, independent of their scale."""

    parameters = 2
    uniforms = 2 * (2 * TRIES + 1)
    smooth = False
    support = "0 to 1"

    def domain(self, raw: Float[Tensor, "*shape P"], scale: Float[Tensor, "*shape"]) -> tuple[Tensor, ...]:
        """Return the two concentrations."""
        first, second = raw.unbind(-1)
        return positive(first), positive(second)

    def log_prob(self, values: Float[Tensor, "*shape"], parameters: tuple[Tensor, ...]) -> Float[Tensor, "*shape"]:
        """Return the log-likelihood of `values`, which are clamped to be just above 0 and below 1."""
        # For large concentrations (values that hardly vary), lgammas almost cancel: float32 has errors of nats.
        dtype = widest_float(values.device)
        known = TorchBeta(*(parameter.to(dtype) for parameter in parameters), validate_args=False)
        return known.log_prob(values.to(dtype).clamp(SMALLEST, 1 - SMALLEST)).to(parameters[0].dtype)

    def sample(self, parameters: tuple[Tensor, ...], noise: Float[Tensor, "*shape U"]) -> Float[Tensor, "*shape"]:
        """Draw the ratio of a gamma variable to the sum of two."""
        half = 2 * TRIES + 1
        first, second = (
            gamma(shape, part) for shape, part in zip(parameters, (noise[..., :half], noise[..., half:]), strict=True)
        )
        return (first - second).sigmoid()

    def supports(self, values: Float[Tensor, "N"]) -> bool:
        """Return whether all `values` are from 0 to 1."""
        return bool(((values >= 0) & (values <= 1)).all())


class Deterministic(Distribution):
    """A single value for each time step: the loss is the absolute error relative to the scale."""

    parameters = 1
    uniforms = 0

    def domain(self, raw: Float[Tensor, "*shape P"], scale: Float[Tensor, "*shape"]) -> tuple[Tensor, ...]:
        """Return the value and the scale."""
        return raw.squeeze(-1) * scale, scale

    def log_prob(self, values: Float[Tensor, "*shape"], parameters: tuple[Tensor, ...]) -> Float[Tensor, "*shape"]:
        """Return the log-likelihood of a Laplace distribution as wide as the scale: -|error| / scale and a constant."""
        value, scale = parameters
        return -(values - value).abs() / scale - (2 * scale).log()

    def sample(self, parameters: tuple[Tensor, ...], noise: Float[Tensor, "*shape U"]) -> Float[Tensor, "*shape"]:
        """Return the value; the noise is ignored."""
        return parameters[0].expand(noise.shape[:-1])


def positive(raw: Tensor) -> Tensor:
    """Map any number to a positive one (section 3.1: log(1 + exp(x)))."""
    return F.softplus(raw) + SMALLEST


def uniform(noise: Tensor) -> Tensor:
    """Replace 0, which a generator can return, by a small number, so that the logarithm is finite."""
    return noise.clamp(min=2.0**-25)


def normals(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return two standard normal variables from two uniform ones (G. E. P. Box and M. E. Muller, 1958)."""
    radius, angle = (-2 * uniform(first).log()).sqrt(), 2 * math.pi * second
    return radius * angle.cos(), radius * angle.sin()


def gamma(shape: Float[Tensor, "*shape"], noise: Float[Tensor, "*shape U"]) -> Float[Tensor, "*shape"]:
    """Return the logarithm of a gamma variable (G. Marsaglia and W. W. Tsang, "A Simple Method for Generating Gamma
    Variables", 2000): the first of a few tries that is accepted, or the last.

    A variable of `shape` is one of shape + 1 times u^(1 / shape) (section 6); for shape + 1, tries are rarely rejected.
    """
    d = shape + 2 / 3
    pairs = [normals(noise[..., 2 * i], noise[..., 2 * i + 1]) for i in range(TRIES // 2)]
    chosen = None
    for i, x in reversed(list(enumerate(x for pair in pairs for x in pair))):
        cube = (1 + x / (9 * d).sqrt()).clamp(min=SMALLEST) ** 3
        logarithm = cube.log()
        taken = uniform(noise[..., TRIES + i]).log() < 0.5 * x * x + d * (1 - cube + logarithm)
        chosen = logarithm if chosen is None else logarithm.where(taken, chosen)
    return d.log() + chosen + uniform(noise[..., 2 * TRIES]).log() / shape


def poisson(mean: Float[Tensor, "*shape"], normal: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the quantile of a Poisson variable at the level of `normal` in the standard normal distribution.

    Small means add up probabilities; others use the expansion of E. A. Cornish and R. A. Fisher (1938), rounded.
    """
    counts = torch.arange(COUNTS, dtype=mean.dtype, device=mean.device)
    factorials = counts.clamp(min=1).log().cumsum(0)  # as logarithms
    few = mean.clamp(SMALLEST, MANY)[..., None]
    below = (counts * few.log() - few - factorials).exp().cumsum(-1)
    below = below / below[..., -1:]  # the sum is 1 up to rounding
    counted = (below < 0.5 * (1 + (normal / math.sqrt(2)).erf())[..., None]).sum(-1).to(mean.dtype)
    root = mean.clamp(min=MANY).sqrt()
    skewed = (normal**2 - 1) / 6 + (normal - normal**3) / (72 * root)
    expanded = (mean + root * normal + skewed).round().clamp(min=0)
    return counted.where(mean < MANY, expanded)
