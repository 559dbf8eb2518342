"""How one state decays, is erased and written: the two backbones as one affine rule.

Every backbone is `S <- e^g (I - erase k k^T) S + write k v^T`, read as q^T S:

    mamba2           erase = none   write = 1
    gated_deltanet   erase = beta   write = beta

so that operators, drift tables and the token loop are written once. A further backbone of this family is one line in
`gates_of`; one outside it brings its own chunk operators.
"""

from __future__ import annotations

from torch import Tensor


def gates_of(beta: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(erase, write) of the backbone that `beta` stands for; None means that the gate is absent (erase 0, write 1)."""
    return beta, beta
