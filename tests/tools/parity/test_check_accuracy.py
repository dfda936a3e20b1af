"""Exact match of tasks before and after quantising, against replies generated one prompt at a time."""

import json
from collections import Counter

import pytest
from helpers.runtime import random_adapter
from helpers.soft_prompts import TASKS
from helpers.tiny_deployments import make_model_folder, seeded_adapter, write_adapter
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime.deployment import Deployment
from adalink.tools.parity.suite import VerifyOptions, verify

PROMPTS = [first + second for first in "abcdefghijkl" for second in "mnopqrstuvwx"]
LENGTH = 4


def replies_of(folder, variant):
    with Deployment.open(folder, variant=variant, threads=1) as deployment:
        return {p: deployment.generate([p], tasks="alpha", max_new_tokens=LENGTH)[0] for p in PROMPTS}


@pytest.fixture(scope="module", params=["bottleneck", "soft prompt"])
def ending(request, tmp_path_factory):
    """A tiny model whose end token is one that it likes to say under a task, deployed in 4 bits as well."""
    root = tmp_path_factory.mktemp("ending")
    adapter = seeded_adapter(make_model_folder(root / "free", "llama"), seed=1)
    if request.param == "soft prompt":
        config = adapter.config
        adapter = random_adapter(config.base_fingerprint, config.hidden_size, 1, **TASKS["both"])
    source, folder = write_adapter(root / "alpha", adapter), root / "free-deployment"
    export_base(root / "free", folder)
    export_adapter(source, folder)
    free = [reply.token_ids for reply in replies_of(folder, None).values()]
    end = Counter(token for tokens in free for token in tokens[1:]).most_common(1)[0][0]
    model = make_model_folder(root / "tiny", "llama")
    network = FAMILIES["llama"]()
    network.config.eos_token_id = network.generation_config.eos_token_id = end
    network.save_pretrained(model)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    tokenizer.save_pretrained(model)
    folder = root / "deployment"
    export_base(model, folder)
    export_base(model, folder, quantization="int4")
    export_adapter(source, folder)
    return model, folder


def test_exact_match_is_that_of_single_prompts(ending, tmp_path):
    """A reply that goes on after the label, or is another, does not count."""
    model, folder = ending
    before, after = replies_of(folder, None), replies_of(folder, "int4")
    stopped = [prompt for prompt, reply in before.items() if reply.finish_reason == "stop" and reply.text.strip()]
    endless = [prompt for prompt, reply in before.items() if reply.finish_reason == "length"]
    wanted = {prompt: before[prompt].text for prompt in stopped + endless[:3]}
    wanted |= {stopped[0]: f"{before[stopped[0]].text}x"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": text}) + "\n" for p, text in wanted.items()))
    report = verify(
        folder, str(model), {}, VerifyOptions(variant="int4", threads=1, quick=True, task_rows={"alpha": path})
    )
    found = report.cost["exact match of alpha"]
    assert found["float32"] == (len(stopped) - 1) / len(wanted)
    right = [
        prompt
        for prompt, text in wanted.items()
        if after[prompt].finish_reason == "stop" and after[prompt].text.strip() == text.strip()
    ]
    assert found["deployed"] == len(right) / len(wanted)
    assert len(stopped) >= 5 <= len(right) < len(stopped) - 1  # rounding to 4 bits shows
    assert abs(found["weights"] - found["deployed"]) <= abs(found["weights"] - found["float32"])
