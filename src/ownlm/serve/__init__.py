"""HTTP: an OpenAI- and Replicate-compatible API and a chat page over one model.

The package itself can be called: `ownlm.serve(ref)` serves until Ctrl-C; see `ownlm.serve.server.serve`.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """`ownlm.serve` is a package and a function of the public API under one name (docs/decisions/0005)."""

    def __call__(self, ref: Any, **settings: Any) -> None:
        """Serve a model over HTTP until Ctrl-C: host, port, api_keys, … as in `ownlm.serve.server.serve`."""
        from ownlm.serve.server import serve

        serve(ref, **settings)


sys.modules[__name__].__class__ = _Callable
