"""Small tokenizers of every type, trained on the documents of the fixtures."""

from pathlib import Path
from typing import Any

from conftest import documents
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast

SPECIAL = ['<unk>', '<s>', '</s>', '<pad>']
NAMES = {'unk_token': '<unk>', 'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '<pad>'}
# As in Llama 3: a word includes the character before it, and punctuation includes the line breaks after it.
LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r'|\s*[\r\n]+|\s+(?!\S)|\s+')


def train(model: Any, trainer: Any, pre_tokenizer: Any, texts: Any = None) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.train_from_iterator(texts or documents('train'), trainer)
    return backend


def bpe(pre_tokenizer: Any, size: int = 400, texts: Any = None, **model: Any) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend = train(models.BPE(**model), trainer, pre_tokenizer, texts)
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def backend_of(kind: str) -> Tokenizer:
    byte_level: Any = pre_tokenizers.ByteLevel
    if kind == 'unigram':
        trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token='<unk>', show_progress=False)
        return train(models.Unigram(), trainer, pre_tokenizers.Metaspace())
    if kind == 'wordpiece':
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
        return train(models.WordPiece(unk_token='<unk>'), trainer, pre_tokenizers.WhitespaceSplit())
    if kind == 'wordlevel':
        trainer = trainers.WordLevelTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
        return train(models.WordLevel(unk_token='<unk>'), trainer, pre_tokenizers.WhitespaceSplit())
    if kind == 'bpe that merges':  # `</s>` is frequent in the corpus, so merges produce the special token
        return bpe(pre_tokenizers.WhitespaceSplit(), texts=[f'{text} </s> </s> </s>' for text in documents('train')])
    if kind == 'bpe of whole words':  # as in Llama 3: a word in the vocabulary is one token, without merges
        return bpe(pre_tokenizers.WhitespaceSplit(), ignore_merges=True)
    if kind == 'prefix':  # as in Llama 2
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
        backend = train(models.BPE(unk_token='<unk>', fuse_unk=True), trainer, pre_tokenizers.Metaspace())
        backend.pre_tokenizer = None  # pyright: ignore[reportAttributeAccessIssue]
        backend.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
        return backend
    if kind == 'llama 3':
        splits = [pre_tokenizers.Split(Regex(LLAMA_3), 'isolated'), byte_level(add_prefix_space=False, use_regex=False)]
        return bpe(pre_tokenizers.Sequence(splits), 500, ignore_merges=True)
    backend = bpe(byte_level(add_prefix_space=False), 500)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)  # pyright: ignore[reportAttributeAccessIssue]
    return backend


ALL = ('byte-level', 'llama 3', 'unigram', 'wordpiece', 'wordlevel', 'bpe that merges', 'bpe of whole words', 'prefix')


def save(kind: str, folder: Path, bos: bool = False) -> Path:
    """Saves a tokenizer of this type to a folder; with `bos`, the tokenizer puts <s> before each text."""
    backend = backend_of(kind)
    cls: Any = LlamaTokenizerFast if kind == 'prefix' else PreTrainedTokenizerFast
    if bos and kind != 'prefix':  # for 'prefix' the class adds it
        template = processors.TemplateProcessing('<s> $A', special_tokens=[('<s>', backend.token_to_id('<s>'))])
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    cls(tokenizer_object=backend, **NAMES).save_pretrained(folder)
    return folder


def without_unknown_token(kind: str, folder: Path) -> Path:
    """Saves a tokenizer with the tokens `<eos>`, `a`, `b` and the space, one for each character."""
    vocabulary = {'<eos>': 0, 'a': 1, 'b': 2, ' ': 3}
    model: Any = {'wordlevel': models.WordLevel, 'wordpiece': models.WordPiece, 'bpe': lambda of: models.BPE(of, []),
                  'unigram': lambda of: models.Unigram([(token, -1.0) for token in of])}[kind]
    backend = Tokenizer(model(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex('.'), 'isolated')  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token='<eos>').save_pretrained(folder)
    return folder


def with_unmarked_eos(folder: Path) -> PreTrainedTokenizerFast:
    """Saves a tokenizer whose EOS token was added as an ordinary word."""
    backend = bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.add_tokens([AddedToken('<stop>', special=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder, eos_token='<stop>')
