# transformers' own types are wrong in places (a model's `weight` is a Tensor or a Module) and slow to read: as for
# mypy, what it gives is Any.
from typing import Any

def __getattr__(name: str) -> Any: ...
