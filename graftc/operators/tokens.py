"""The token count as a symbol, so that a cost function gives a formula."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tokens:
    """A polynomial in N: `coefficients[i]` is that of Nⁱ. As a size, N is larger than any number.

    >>> n = Tokens((0, 1))
    >>> str(4 * n * n + 3 * n), str(2 * n * min(n, 9)), str(n * n + -5)
    ('4·N² + 3·N', '18·N', '1·N² − 5')
    """

    coefficients: tuple[float, ...]

    def __add__(self, other: Tokens | float) -> Tokens:
        theirs = other.coefficients if isinstance(other, Tokens) else (other,)
        size = max(len(self.coefficients), len(theirs))
        padded = [(*c, *(0,) * (size - len(c))) for c in (self.coefficients, theirs)]
        return Tokens(tuple(a + b for a, b in zip(*padded, strict=True)))

    def __mul__(self, other: Tokens | float) -> Tokens:
        theirs = other.coefficients if isinstance(other, Tokens) else (other,)
        made = [0.0] * (len(self.coefficients) + len(theirs) - 1)
        for i, a in enumerate(self.coefficients):
            for j, b in enumerate(theirs):
                made[i + j] += a * b
        return Tokens(tuple(int(c) if float(c).is_integer() else c for c in made))

    __radd__ = __add__
    __rmul__ = __mul__

    def __gt__(self, other: float) -> bool:
        return True

    def __lt__(self, other: float) -> bool:
        return False

    def __str__(self) -> str:
        powers = ("", "·N", "·N²", "·N³", "·N⁴")
        terms = [f"{c:,}{p}" for c, p in zip(self.coefficients, powers, strict=False) if c]
        return (" + ".join(reversed(terms)) or "0").replace("+ -", "− ")
