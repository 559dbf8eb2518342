"""How one state decays, is erased and written: the two backbones as one affine rule with one optional gate.

    gated_deltanet   S <- e^g (I - beta k k^T) S + beta k v^T
    mamba2           S <- e^g S + k v^T                        (beta None)

read as q^T S, so that operators, drift tables and the token loop are written once. A backbone that erases and writes
with different strengths needs chunk operators of its own: T in operators.py serves both because they are one gate.
"""
