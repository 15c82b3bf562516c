"""The tasks, by name."""

from evidence.tasks.base import Task
from evidence.tasks.digits import Digits
from evidence.tasks.language import Language
from evidence.tasks.minilm import Docstrings
from evidence.tasks.quadratics import Quadratics

TASKS: dict[str, Task] = {
    "quadratics": Quadratics(noise=0.0),
    "quadratics-noise": Quadratics(noise=1.0),
    "lm-small": Language(width=128, layers=2, steps=600),
    "lm-large": Language(width=384, layers=6, steps=300),
    "minilm": Docstrings(),
    "digits": Digits(),
}

__all__ = ["TASKS", "Task"]
