"""A character tokenizer that fits the tiny models' vocabulary, of the real `tokenizers` and transformers classes."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

from helpers.tiny_models import VOCAB_SIZE

if TYPE_CHECKING:
    from transformers import BertTokenizer, PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = tuple(chr(code) for code in range(ord(" "), ord(" ") + VOCAB_SIZE - len(SPECIALS)))
CHAT_TEMPLATE = (
    "{% if messages[0]['content'] == 'forbidden' %}{{ raise_exception('not this word') }}{% endif %}"
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(SPECIALS + CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_pair_tokenizer() -> BertTokenizer:
    """BERT's tokenizer with a vocabulary of letters and digits: it joins two texts and gives their token types."""
    from transformers import BertTokenizer

    characters = string.ascii_lowercase + string.digits
    tokens = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{one}" for one in characters), *".,?!'-")
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})


TILE_SPECIALS = (
    *("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
)


def make_prefix_tokenizer() -> PreTrainedTokenizerFast:
    """The same with a placeholder that is no character; by itself it begins each text with its token, as Gemma's do."""
    return with_beginning(make_tile_tokenizer(("<image>",)))


def with_beginning(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, which now begins each text with its token."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return tokenizer


def make_tile_tokenizer(specials: tuple[str, ...] = TILE_SPECIALS) -> PreTrainedTokenizerFast:
    """The same with the tokens of a model that takes tiles; two line ends are one token, as in many vocabularies.

    Args:
        specials: leave some out and they become several tokens, as in checkpoints that never had them.
    """
    from tokenizers import AddedToken
    from tokenizers.models import WordLevel

    tokenizer = make_tokenizer()
    vocabulary = tokenizer.get_vocab() | {"\n": VOCAB_SIZE, "\n\n": VOCAB_SIZE + 1}
    tokenizer.backend_tokenizer.model = WordLevel(vocabulary, unk_token="<unk>")
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in specials], special_tokens=True)
    return tokenizer


def make_bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Characters and two merges, of a kind that JavaScript reads too; each text begins with ``<bos>``."""
    from tokenizers import Tokenizer, decoders, models
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokens = (*SPECIALS, *CHARACTERS[:-2], "th", "the")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
