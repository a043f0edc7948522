"""Settings for every test."""

from hypothesis import settings

# No test asserts a time: the machine may be busy with others.
settings.register_profile("ownlm", deadline=None, max_examples=50)
settings.load_profile("ownlm")
