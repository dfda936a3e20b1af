"""What `adalink verify` generates with."""

import pytest
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer

from adalink.export.base.export import export_base
from adalink.runtime.backends import open_backend
from adalink.runtime.deployment import Deployment
from adalink.tools.common.observed_backend import ObservedBackend
from adalink.tools.parity.checks.generation import Generator


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "portable"])
def test_an_engine_that_makes_no_drafts_is_asked_once(target, tmp_path):
    passes = []
    backend = ObservedBackend(open_backend("onnxruntime-cpu", 1), lambda: passes.append(1))
    export_base(FAMILIES["llama"](), tmp_path, tokenizer=make_tokenizer(), target=target)
    with Deployment.open(tmp_path, threads=1) as deployment:
        generator = Generator(deployment, backend, target)
        first = generator.generate_speculatively([5, 6, 7] * 4, None, 8)
        asked = len(passes)
        second = generator.generate_speculatively([9, 5, 6] * 4, None, 8)
        generator.close()
    if target == "portable":
        assert first is second is None
        assert 1 < asked == len(passes)
        return
    for row, made in (first, second):
        assert len(row.tokens) == len(row.logits) == 8
        assert made < 8
    assert first[1] + second[1] + 2 == len(passes)
