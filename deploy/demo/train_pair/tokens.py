"""The pair's tokenizer, and samples as token ids with a mark on those that the model learns to predict.

Knows nothing of models. Invariant: a sample is rendered here by the same chat template that serving applies.
"""

from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deploy.demo.corpus import DOMAINS, Prompt, prompts
from deploy.demo.domains.stdlib import functions, module_names

VOCAB_SIZE = 4096
MAX_LENGTH = 2048
PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(seed: int, num_samples: int = 2500) -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly `VOCAB_SIZE` tokens over `num_samples` training samples of each domain."""
    return byte_level_bpe(_texts(seed, num_samples), VOCAB_SIZE)


def byte_level_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `vocab_size` tokens with this module's roles and chat template.

    Raises ValueError where the texts are too few for so many.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BEGIN, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the vocabulary has {tokenizer.get_vocab_size()} tokens, not {vocab_size}: draw more samples"
        )
    return _wrap(tokenizer)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that an earlier stage saved."""
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> list[int]:
    """Token ids of a request up to where the answer begins."""
    return chat_ids(tokenizer, *prompt.messages)


def chat_ids(tokenizer: PreTrainedTokenizerFast, *messages: dict[str, str]) -> list[int]:
    """Token ids of a conversation up to where the next answer begins."""
    rendered = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer.encode(str(rendered), add_special_tokens=False)
    return ids


def answer_ids(tokenizer: PreTrainedTokenizerFast, answer: str) -> list[int]:
    """Token ids of an answer with the end-of-turn token."""
    return [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]


def _texts(seed: int, num_samples: int) -> list[str]:
    streams = [islice(prompts(domain, "train", seed), num_samples) for domain in DOMAINS]
    chats = [f"{prompt.messages[0]['content']}\n{prompt.answer}" for prompt in chain(*streams)]
    rng = Random(seed)
    return chats + [source for name in module_names() for source in functions(name) if rng.random() < 0.5]


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
