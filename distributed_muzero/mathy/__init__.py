"""Mathy's states, environments, policy/value model and A3C agent, as mathy's own documents name them (docs/mathy.md).

The rules of the games are those of the package mathy_envs; MuZero plays them as environments `mathy:…`.
"""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # notes on the imports of third parties
    import mathy_envs  # noqa: F401
