"""A trainer for image models that is configured with Hydra.

In Python, for example in a notebook:

    import trainer

    result = trainer.train(["method.rank=4", "steps=20"])
    trainer.sample(run=result, prompts=["make it night"], images=["photo.jpg"])
    trainer.evaluate(run=result)

Importing this imports neither torch nor Hydra.
"""

from trainer.core import errors, installation, libraries
from trainer.core.version import __version__

installation.check_python()
# This must happen before anything imports diffusers, which would import bitsandbytes.
libraries.hide_bitsandbytes()

from trainer.api import EvaluationResult, SamplingResult, TrainingResult, evaluate, sample, train  # noqa: E402

__all__ = [
    "EvaluationResult",
    "SamplingResult",
    "TrainingResult",
    "__version__",
    "errors",
    "evaluate",
    "sample",
    "train",
]
