# Ray is an extra that `make lint` does not install: what it gives is Any.
from typing import Any

def __getattr__(name: str) -> Any: ...
