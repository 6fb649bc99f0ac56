"""Kubernetes quantities as numbers, and back."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Final

_FACTORS: Final = {
    "m": Decimal("0.001"),
    "k": Decimal(10**3),
    "M": Decimal(10**6),
    "G": Decimal(10**9),
    "T": Decimal(10**12),
    "P": Decimal(10**15),
    "Ki": Decimal(2**10),
    "Mi": Decimal(2**20),
    "Gi": Decimal(2**30),
    "Ti": Decimal(2**40),
    "Pi": Decimal(2**50),
}


def number(quantity: str) -> Decimal:
    """The value of a quantity; decimal.InvalidOperation where it is none.

    >>> number("1500m"), number("2Ki")
    (Decimal('1.500'), Decimal('2048'))
    """
    for suffix in sorted(_FACTORS, key=len, reverse=True):
        if quantity.endswith(suffix):
            return Decimal(quantity[: -len(suffix)]) * _FACTORS[suffix]
    return Decimal(quantity)


def memory(size: int) -> str:
    """Bytes as a quantity of at most four digits, rounded up.

    >>> memory(3 * 2**30), memory(20 * 2**30), memory(1)
    ('3072Mi', '20Gi', '1Ki')
    """
    for suffix, factor in (("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30)):
        if size < 10_000 * factor:
            return f"{math.ceil(size / factor)}{suffix}"
    return f"{math.ceil(size / 2**40)}Ti"
