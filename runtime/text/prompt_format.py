"""How a model's own processor writes a prompt around what people write, for models that were trained on one form."""

from __future__ import annotations

import msgspec


class PromptForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prompt's images, then its text between two others, as transformers' ``PaliGemmaProcessor`` writes it.

    Attributes:
        image: text of the placeholder.
        before: what stands between images and text.
        after: what stands behind the text.
    """

    image: str
    before: str
    after: str

    def written(self, prompt: str, images: int) -> str:
        r"""The whole text, to be tokenized without further special tokens.

        Args:
            prompt: what people write; where it has placeholders, images stand there instead of in front of it, and
                its text begins behind the last.
            images: how many images it has.

        >>> PromptForm(image="<image>", before="<bos>", after="\n").written("caption en", 1)
        '<image><bos>caption en\n'
        """
        last = prompt.rfind(self.image)
        if last < 0:
            return f"{self.image * images}{self.before}{prompt}{self.after}"
        end = last + len(self.image)
        return f"{prompt[:end]}{self.before}{prompt[end:]}{self.after}"
