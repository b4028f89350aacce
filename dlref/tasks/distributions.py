"""What the values of a series are distributed as, given what a network answers.

Each class brings a network's P numbers to their domains, in the units of the series, and gives the logarithm of the
likelihood of values. Densities are torch's.

Legend of shapes: ... any, P parameters of the distribution.
"""

from jaxtyping import Float
from torch import Tensor
from torch.distributions import Beta as TorchBeta
from torch.distributions import NegativeBinomial as TorchNegativeBinomial
from torch.distributions import Normal
from torch.distributions import StudentT as TorchStudentT
from torch.nn import functional as F

SMALLEST = 1e-6  # of what has to be above 0


class Distribution:
    """A family of distributions with P `parameters`."""

    parameters: int

    def domain(self, raw: Float[Tensor, "*shape P"], scale: Float[Tensor, "*shape"]) -> tuple[Tensor, ...]:
        """The parameters (...) in their domains; `scale` is that of each series."""
        raise NotImplementedError

    def log_prob(self, values: Float[Tensor, "*shape"], parameters: tuple[Tensor, ...]) -> Float[Tensor, "*shape"]:
        """The logarithm of the likelihood of `values`."""
        raise NotImplementedError


class StudentT(Distribution):
    """Degrees of freedom above 2, so that there is a variance; place and width in scales of the series."""

    parameters = 3

    def domain(self, raw: Float[Tensor, "*shape P"], scale: Float[Tensor, "*shape"]) -> tuple[Tensor, ...]:
        """Degrees of freedom, place, width."""
        freedom, place, width = raw.unbind(-1)
        return 2 + F.softplus(freedom), place * scale, positive(width) * scale

    def log_prob(self, values: Float[Tensor, "*shape"], parameters: tuple[Tensor, ...]) -> Float[Tensor, "*shape"]:
        """The logarithm of the likelihood of `values`."""
        return TorchStudentT(*parameters, validate_args=False).log_prob(values)


class Gaussian(Distribution):
    """The paper's for real values: mean and standard deviation, in scales of the series (section 3.1)."""

    parameters = 2

    def domain(self, raw: Float[Tensor, "*shape P"], scale: Float[Tensor, "*shape"]) -> tuple[Tensor, ...]:
        """Mean, standard deviation."""
        mean, deviation = raw.unbind(-1)
        return mean * scale, positive(deviation) * scale

    def log_prob(self, values: Float[Tensor, "*shape"], parameters: tuple[Tensor, ...]) -> Float[Tensor, "*shape"]:
        """The logarithm of the likelihood of `values`."""
        return Normal(*parameters, validate_args=False).log_prob(values)


class NegativeBinomial(Distribution):
    """The paper's for counts: mean mu and shape alpha, with variance mu + mu² alpha (sections 3.1 and 3.3)."""

    parameters = 2

    def domain(self, raw: Float[Tensor, "*shape P"], scale: Float[Tensor, "*shape"]) -> tuple[Tensor, ...]:
        """Mean, shape: the shape is divided by the root of the scale."""
        mean, shape = raw.unbind(-1)
        return positive(mean) * scale, positive(shape) / scale.sqrt()

    def log_prob(self, values: Float[Tensor, "*shape"], parameters: tuple[Tensor, ...]) -> Float[Tensor, "*shape"]:
        """The logarithm of the likelihood of `values`, whole numbers of 0 or more."""
        mean, shape = parameters
        return TorchNegativeBinomial(1 / shape, logits=(mean * shape).log(), validate_args=False).log_prob(values)


class Beta(Distribution):
    """For values between 0 and 1, whatever their scale."""

    parameters = 2

    def domain(self, raw: Float[Tensor, "*shape P"], scale: Float[Tensor, "*shape"]) -> tuple[Tensor, ...]:
        """The two concentrations."""
        first, second = raw.unbind(-1)
        return positive(first), positive(second)

    def log_prob(self, values: Float[Tensor, "*shape"], parameters: tuple[Tensor, ...]) -> Float[Tensor, "*shape"]:
        """The logarithm of the likelihood of `values`; 0 and 1 themselves are taken for what is next to them."""
        inside = values.clamp(SMALLEST, 1 - SMALLEST)
        return TorchBeta(*parameters, validate_args=False).log_prob(inside)


class Deterministic(Distribution):
    """A single value for each time: the loss is the absolute error in scales of the series."""

    parameters = 1

    def domain(self, raw: Float[Tensor, "*shape P"], scale: Float[Tensor, "*shape"]) -> tuple[Tensor, ...]:
        """The value, and the scale."""
        return raw.squeeze(-1) * scale, scale

    def log_prob(self, values: Float[Tensor, "*shape"], parameters: tuple[Tensor, ...]) -> Float[Tensor, "*shape"]:
        """That of a Laplace distribution as wide as the scale, which has its maximum where the error is least."""
        value, scale = parameters
        return -(values - value).abs() / scale - (2 * scale).log()


def positive(raw: Tensor) -> Tensor:
    """Any number -> one above 0 (section 3.1: log(1 + exp(x)))."""
    return F.softplus(raw) + SMALLEST
