"""HTTP: an OpenAI- and Replicate-compatible API and a chat page over one model."""

from ownlm.serve.app import create_app
from ownlm.serve.server import serve

__all__ = ["create_app", "serve"]
