"""Sparse sequence models in JAX.

Dimension letters, in annotations, einsum strings and docstrings:

    B batch        L length         D model width     E value width (2D)   Z query/key width   N EMA state size
    W window       T packed rows    V vocabulary      Y classes            H heads             C EMA chunk
    K EMA kernel length             M hypernetwork conditioning width

Boolean arrays are named for what they select, and True means "use": `active` (B, L) selects the elements that a module
is computed for, `valid` (B, L) those that are not padding. A packed array never shares a name with its full-length
form: `v` and `v_packed`.
"""

from seqboat.version import __version__

__all__ = ["__version__"]
