r"""The functions of a matrix that exponential integrators are made of.

Forward and reverse derivatives of any order go through all of this: the steps of a
solver are differentiated once for Newton's method, and again for gradients.
"""

import math

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._affine import matmul
from .._foreign import bounded_while_loop


# The series is summed where the norm is at most one, so rounding is not amplified.
# Matrices beyond 2**120 are beyond reach: inverse powers of two underflow in float32.
_MAX_SQUARINGS = 120
# Nested loops of 11 * 11 steps, of which those not needed cost next to nothing.
_LOOP_BASE = 11

# Where a number is at most this large its series is summed. The recurrence on the other
# side divides by the number `order` times, so it wants one that is not small.
_SCALAR_RADIUS = 2.0


def _degree(order: int, radius: float, eps: float) -> int:
    """How many terms give even the second derivative to rounding."""
    m = 2
    while m * (m + 1) * radius ** (m + 1) * math.factorial(
        order
    ) > eps * math.factorial(m + 1 + order):
        m += 1
    return m


def _coefficients(order: int, radius: float, eps: float) -> list[float]:
    degree = _degree(order, radius, eps)
    return [1 / math.factorial(j + order) for j in range(degree + 1)]


def _polynomial(c: list[float], A: Array, eye: Array) -> Array:
    """`c[0] + c[1] A + c[2] A**2 + ...`, in about `2 * sqrt(len(c))` products."""
    q = max(1, round(math.sqrt(len(c) - 1)))
    powers = [eye, A]
    for _ in range(q - 1):
        powers.append(matmul(powers[-1], A))

    def block(first, last):
        terms = [x * p for x, p in zip(c[first:last], powers, strict=False)]
        return sum(terms[1:], terms[0])

    # The highest block has one more term, for which the power is there already.
    first = (len(c) - 2) // q * q
    value = block(first, len(c))
    while first > 0:
        first -= q
        value = matmul(powers[q], value) + block(first, first + q)
    return value


def _double(expm1: Array, phis: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
    r"""`expm1` and $\varphi_1, \varphi_2, \dots$ of $2A$ from those of $A$."""
    doubled = []
    for k in range(1, len(phis) + 1):
        total = matmul(expm1, phis[k - 1]) + 2 * phis[k - 1]
        for j in range(1, k):
            total = total + phis[j - 1] / math.factorial(k - j)
        doubled.append(total * 0.5**k)
    return matmul(expm1, expm1) + 2 * expm1, tuple(doubled)


def _number(z: Array, order: int) -> tuple[Array, ...]:
    """The functions of a number, by the exponential or, where that cancels, a series.

    Each branch is given a harmless number where it is not used, for the sake of the
    derivatives.
    """
    is_small = jnp.abs(z) <= _SCALAR_RADIUS
    small = jnp.where(is_small, z, 0)
    large = jnp.where(is_small, 1, z)
    eps = float(jnp.finfo(z.dtype).eps)
    series = jnp.zeros_like(z)
    for c in reversed(_coefficients(order, _SCALAR_RADIUS, eps)):
        series = series * small + c
    from_series = [series]
    for k in range(order - 1, 0, -1):
        from_series.append(small * from_series[-1] + 1 / math.factorial(k))
    from_series.reverse()
    from_exp = [jnp.expm1(large) / large]
    for k in range(1, order):
        from_exp.append((from_exp[-1] - 1 / math.factorial(k)) / large)
    phis = zip(from_series, from_exp, strict=True)
    return (jnp.exp(z), *(jnp.where(is_small, a, b) for a, b in phis))


def phi_functions(
    A: Float[Array, "state state"], order: int
) -> tuple[Float[Array, "state state"], ...]:
    r"""The $\varphi$-functions of a matrix.

    $$\varphi_0(A) = e^A, \qquad \varphi_k(A) = \sum_{j \ge 0} \frac{A^j}{(j + k)!},
    \qquad \varphi_k(A) = A \varphi_{k+1}(A) + \tfrac{1}{k!} I,$$

    by scaling and squaring: a series of $2^{-s} A$, whose norm is at most one, and
    then $s$ times

    $$\varphi_k(2A) = 2^{-k} \Bigl[ e^A \varphi_k(A)
    + \sum_{j=1}^k \frac{\varphi_j(A)}{(k - j)!} \Bigr].$$

    What is squared is $e^A - I$ and not $e^A$, so that slow components keep their
    digits beside stiff ones. The error is of the size of rounding times the condition
    of the problem: $\varepsilon \|A\|$ in general, $\varepsilon$ where stiff and slow
    components are not mixed. Where $e^A$ overflows the answer is not finite, nor is it
    for an $A$ that is not.

    Costs about $10 + k + s (k + 1)$ products for $k$ = `order` and
    $s = \log_2 \|A\|$. Over a grid (`jax.vmap`) the largest of the matrices decides
    on $s$. Derivatives of any order go through, forward and reverse.

    **Arguments:**

    - `A`: the matrix, of shape `(state, state)` and without units: a step length times
        a Jacobian.
    - `order`: the last $k$, not negative.

    **Returns:**

    $(\varphi_0(A), \dots, \varphi_k(A))$, each of the shape of `A`.

    **Raises:**

    - `ValueError`: if `order` is negative or `A` is not square.

    !!! example

        >>> import jax.numpy as jnp
        >>> phi_0, phi_1 = phi_functions(jnp.diag(jnp.array([0.0, -1.0])), 1)
        >>> [round(float(x), 3) for x in (phi_0[1, 1], phi_1[0, 0], phi_1[1, 1])]
        [0.368, 1.0, 0.632]

    ??? cite "Reference"

        Skaflestad and Wright (2009), *The scaling and modified squaring method for
        matrix functions related to the exponential*, Applied Numerical Mathematics 59.
    """
    if order < 0:
        raise ValueError(f"`order` must not be negative; got {order}.")
    if A.ndim != 2 or A.shape[0] != A.shape[1]:
        raise ValueError(f"`A` must be a square matrix; got shape {A.shape}.")
    size = A.shape[0]
    if size == 0:
        return (A,) * (order + 1)
    highest = max(order, 1)
    if size == 1:
        return _number(A, highest)[: order + 1]

    eye = jnp.eye(size, dtype=A.dtype)
    absolute = jnp.abs(lax.stop_gradient(A))
    norm = jnp.minimum(jnp.max(jnp.sum(absolute, 0)), jnp.max(jnp.sum(absolute, 1)))
    squarings = jnp.where(
        (norm > 1) & jnp.isfinite(norm), jnp.ceil(jnp.log2(norm)), 0
    ).astype(jnp.int32)
    squarings = jnp.minimum(squarings, _MAX_SQUARINGS)
    A = A * jnp.ldexp(jnp.ones((), A.dtype), -squarings)

    eps = float(jnp.finfo(A.dtype).eps)
    phis = [_polynomial(_coefficients(highest, 1.0, eps), A, eye)]
    for k in range(highest - 1, 0, -1):
        phis.append(matmul(A, phis[-1]) + eye / math.factorial(k))
    phis.reverse()
    expm1 = matmul(A, phis[0])

    # Stops after as many squarings as the stiffest matrix of the grid needs, and goes
    # both ways in differentiation.
    _, expm1, phis = bounded_while_loop(
        lambda carry: carry[0] < squarings,
        lambda carry: (carry[0] + 1, *_double(carry[1], carry[2])),
        (jnp.zeros((), jnp.int32), expm1, tuple(phis)),
        max_steps=_MAX_SQUARINGS,
        base=_LOOP_BASE,
    )
    return (eye + expm1, *phis)[: order + 1]


def phi_functions_half_and_full(
    A: Float[Array, "state state"], order: int
) -> tuple[
    tuple[Float[Array, "state state"], ...], tuple[Float[Array, "state state"], ...]
]:
    r"""The $\varphi$-functions of $A / 2$ and of $A$, for little more than the latter.

    As [`phi_functions`][deer_ode._discretisation._phi.phi_functions] otherwise;
    `order` is at least one.
    """
    half = phi_functions(A / 2, order)
    if A.shape[0] < 2:
        return half, phi_functions(A, order)
    eye = jnp.eye(A.shape[0], dtype=A.dtype)
    expm1, full = _double(half[0] - eye, half[1:])
    return half, (eye + expm1, *full)
