"""Folders that ``rgfast probe`` takes, made once."""

import socket

import numpy as np
import pytest
import torch

import rgfast

WORDS = [
    "the",
    "a",
    "of",
    "and",
    "flow",
    "stack",
    "layer",
    "rank",
    "falls",
    "rises",
    "token",
    "chain",
    "short",
    "long",
    "deep",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Models here are too small for a second thread to be worth waking."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def own_folder(tmp_path_factory):
    """A small MaskedTokenModel on disk: 5 states, 4 positions."""
    folder = tmp_path_factory.mktemp("models") / "own"
    generator = torch.Generator().manual_seed(0)
    rgfast.MaskedTokenModel(5, 4, width=8, depth=3, w2_scale=0.5, generator=generator).save(folder)
    return folder


@pytest.fixture(scope="session")
def own_tokens(tmp_path_factory):
    """Tokens for it, 0..5, of which 5 is the mask."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, 6, (200, 4)))
    return path


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    """A small encoder with a masked-token head and its tokenizer, as Hugging Face saves them."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: k for k, word in enumerate([*SPECIAL, *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{word[1:-1].lower()}_token": word for word in SPECIAL}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "bert"
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Sixty lines of three to eleven words."""
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, rng.integers(3, 12))) for _ in range(60)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def no_network(monkeypatch):
    """Any connection is an error."""

    def refuse(*args):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
