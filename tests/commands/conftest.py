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
def seq2seq_folders(tmp_path_factory):
    """Small encoder-decoders by name and the encoder of one alone, with a tokenizer without a mask token."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: k for k, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    t5 = transformers.T5Config(
        vocab_size=len(vocabulary),
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    bart = transformers.BartConfig(
        vocab_size=len(vocabulary), d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
        pad_token_id=0, eos_token_id=1, bos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("seq2seq")
    models = {
        "t5": transformers.T5ForConditionalGeneration(t5),
        "bart": transformers.BartForConditionalGeneration(bart),
        "encoder": transformers.T5EncoderModel(t5),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in models}


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
