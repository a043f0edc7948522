"""Training: objectives, optimizers, the loop, resumable states, and the plan made before a run."""
