"""Settings for every test."""

import torch
from hypothesis import settings

# No test asserts a time: the machine may be busy with others.
settings.register_profile("ownlm", deadline=None, max_examples=50)
settings.load_profile("ownlm")

# Models of a few thousand parameters gain nothing from threads, and on a busy machine they wait for each other.
torch.set_num_threads(1)
