"""The three tokenizers of the text flow, and how reports are cut.

C_T (section 3.2) reads CLIP ids; the text autoencoder (Optimus, section 4) encodes BERT ids and decodes GPT-2 ids.
Texts are lower-cased, with single spaces, before any of them. Formats, n ids each:

    clip  <|startoftext|> ids <|endoftext|> then <|endoftext|> as padding; it has the highest id
    bert  [CLS] ids [SEP] then [PAD] = 0; the caller lower-cases, the vocabulary is taken as cased
    gpt2  <BOS> ids <EOS> then <PAD>; one space is put in front; pad, bos, eos are the last three ids

Either trained here on a data set's texts or read from folders in the published layouts.

Two limits cut a report: so many words are read of it (`report_words`), and so many ids are held. The autoencoder gets
the first of both. C_T, where the whole does not fit, gets the impression first, then findings sentences, whole ones as
long as they fit: what the words' limit would take away is chosen from as well.
"""

import json
import re
import string
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tokenizers as hf
from etils import epath
from jaxtyping import Int, Int32
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from medm2g_jax.data.source import SURROGATE
from medm2g_jax.errors import UserError

CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
GPT2_SPECIAL = ("<PAD>", "<BOS>", "<EOS>")
CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
FEW = 5  # subjects: words of fewer are left out of vocabularies that are learned of texts which are not open
CACHED = 100_000  # texts, about 1 kB each, and words of each tokenizer

_SECTION = re.compile(r"\b(finding|impression|conclusion)s?\s*:", re.IGNORECASE)
_WORD = re.compile(r"\w+")
_LETTERS = re.compile(r"[^\W\d_]{2,}")
_SENTENCE = re.compile(r"(?<=[.!?;])\s+")


def normalise(text: str) -> str:
    """Lower case, single spaces: the form that every tokenizer sees and `decode` gives back.

    Half characters (lone surrogates: a command line that is no UTF-8 has them) become U+FFFD.
    """
    return " ".join(SURROGATE.sub("\ufffd", text).lower().split())


def cut_words(text: str, count: int) -> str:
    """The first `count` words (100 for MIMIC-CXR and 60 for IU X-ray reports, the field's custom)."""
    return " ".join(text.split()[:count])


def impression_first(text: str) -> list[str]:
    """Sentences of a report in the order in which C_T takes them: impression, then findings; [] without sections."""
    first: list[str] = []  # impression, or conclusion, as some call it
    findings: list[str] = []
    heads = list(_SECTION.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    for head, end in zip(heads, ends, strict=False):  # no head: nothing
        section = findings if head[1].lower() == "finding" else first
        section += _SENTENCE.split(text[head.start() : end].strip())
    return first + findings


def common(texts: Sequence[str], subjects: Sequence[str]) -> list[str]:
    """Texts without the words that stand in those of fewer than FEW subjects: names, numbers and dates of one person.
    A vocabulary that is learned of them spells such words letter by letter, as any word it has never seen.

    Args:
      subjects: whose each text is.
    """
    whose: dict[str, set[str]] = {}
    for text, subject in zip(texts, subjects, strict=True):
        for word in _WORD.findall(normalise(text)):
            if len(of := whose.setdefault(word, set())) < FEW:
                of.add(subject)
    kept = {word for word, of in whose.items() if len(of) >= FEW}
    return [normalise(_WORD.sub(lambda w: w[0] if w[0] in kept else " ", normalise(text))) or "." for text in texts]


class Tokenizers:
    """The three tokenizers together; encoded texts are remembered, since texts repeat.

    Attributes:
      sizes: vocabulary sizes, {"clip": v, "bert": v, "gpt2": v}.
      pad: each tokenizer's padding id.
      report_words: words of a text that are read; None for all.
    """

    def __init__(self, clip: hf.Tokenizer, bert: hf.Tokenizer, gpt2: hf.Tokenizer, report_words: int | None = None):
        self.report_words = report_words
        self._backends = {"clip": clip, "bert": bert, "gpt2": gpt2}
        for backend in self._backends.values():
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = True  # "<|endoftext|>" inside a report is text
        self.sizes = {name: backend.get_vocab_size() for name, backend in self._backends.items()}
        self._frame = {  # begin, end, pad
            "clip": tuple(clip.token_to_id(t) for t in (CLIP_BOS, CLIP_EOS, CLIP_EOS)),
            "bert": tuple(bert.token_to_id(t) for t in ("[CLS]", "[SEP]", "[PAD]")),
            "gpt2": tuple(gpt2.token_to_id(t) for t in ("<BOS>", "<EOS>", "<PAD>")),
        }
        self.pad = {name: pad for name, (_, _, pad) in self._frame.items()}
        self._unknown_id = {"bert": bert.token_to_id("[UNK]")}  # the others spell in bytes what they do not know
        self._specials = {*self._frame["gpt2"], gpt2.token_to_id("<|endoftext|>")}
        self._words: dict[str, dict[str, list[int]]] = {name: {} for name in self._backends}
        self._cache: dict[tuple, dict[str, np.ndarray]] = {}
        self._lock = threading.Lock()
        self._seen: Counter[str] = Counter()
        self._cut: Counter[str] = Counter()

    @classmethod
    def train(cls, texts: Iterable[str], folder: epath.PathLike, vocab_size: int = 2048) -> "Tokenizers":
        """Train all three on `texts`, at most `vocab_size` ids each, and save them under `folder`.

        The result depends on the texts alone. Every byte (BERT: every ASCII character) is in the vocabulary, so that
        prompts with words never seen in training are still read.

        Raises:
          UserError: no text, or `vocab_size` does not even hold the bytes.
        """
        texts = [normalise(text) for text in texts]
        if not any(texts):
            raise UserError("tokenizers: no texts to train on")
        if vocab_size < 600:
            raise UserError(f"tokenizers: vocab_size must be at least 600 (CLIP spends 514 on bytes), not {vocab_size}")
        save = {"clip": _train_clip, "bert": _train_bert, "gpt2": _train_gpt2}
        for name, train in save.items():
            path = epath.Path(folder) / name
            path.mkdir(parents=True, exist_ok=True)
            backend, config = train(texts, vocab_size)
            (path / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
            (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
        return cls.load(folder)

    @classmethod
    def load(cls, folder: epath.PathLike, report_words: int | None = None) -> "Tokenizers":
        """Read `folder`/{clip,bert,gpt2}: tokenizer.json, or vocab.json + merges.txt (bert: vocab.txt).

        Raises:
          UserError: a folder or file is missing, or what was read is not in the format above.
        """
        found = (load_one(epath.Path(folder) / name, name) for name in ("clip", "bert", "gpt2"))
        return cls(*found, report_words)

    def encode(self, text: str, lengths: Mapping[str, int]) -> dict[str, Int32[np.ndarray, "_"]]:
        """Ids of `text` in the formats that `lengths` names, padded or cut to that many.

        A cut text keeps its end mark. The arrays are shared between calls and read-only.
        """
        key = (text, *lengths.items())
        if (known := self._cache.get(key)) is not None:
            return known
        plain, result, cut = normalise(text), {}, []
        for name, length in lengths.items():
            begin, end, pad = self._frame[name]
            ids, whole = self._fitted(name, plain, length)
            if not whole:
                cut.append(name)
            result[name] = np.full(length, pad, np.int32)
            result[name][: len(ids) + 2] = [begin, *ids, end]
            result[name].setflags(write=False)
        with self._lock:
            self._seen.update(lengths.keys())
            self._cut.update(cut)
            if len(self._cache) >= CACHED:
                self._cache.clear()
            self._cache[key] = result
        return result

    def _fitted(self, name: str, plain: str, length: int) -> tuple[list[int], bool]:
        """Ids of a normalised text without its frame, and whether they are all of it."""
        room, words = length - 2, plain.split()
        most = len(words) if self.report_words is None else self.report_words
        first = self._ids(name, " ".join(words[:most]))
        if len(first) <= room and len(words) <= most:
            return first, True
        chosen = self._impression_first(plain, room, most) if name == "clip" else []
        return chosen or first[:room], False

    def _impression_first(self, plain: str, room: int, most: int) -> list[int]:
        """Ids of the sentences that C_T takes of a text that is too long; [] where it has no sections."""
        taken: list[int] = []
        words = 0
        for sentence in impression_first(plain):
            ids = self._ids("clip", sentence)
            words += len(sentence.split())
            if len(taken) + len(ids) > room or words > most:
                return taken or self._ids("clip", cut_words(sentence, most))[:room]
            taken += ids
        return taken

    def _ids(self, name: str, text: str) -> list[int]:
        # All three split at spaces first, so that a word's ids do not depend on its neighbours: a new text of known
        # words (the phantom's paraphrases) costs look-ups only.
        ids, words = [], self._words[name]
        for word in text.split():
            known = words.get(word)
            if known is None:
                piece = f" {word}" if name == "gpt2" else word
                known = self._backends[name].encode(piece, add_special_tokens=False).ids
                if len(words) < CACHED:
                    words[word] = known
            ids += known
        return ids

    def decode(self, ids: Int[np.ndarray, "n"]) -> str:
        """GPT-2 ids to text: up to the first <EOS>, without special tokens."""
        end, kept = self._frame["gpt2"][1], []
        for token in (int(i) for i in ids):
            if token == end:
                break
            if token not in self._specials:
                kept.append(token)
        return self._backends["gpt2"].decode(kept).strip()

    @property
    def truncated(self) -> dict[str, float]:
        """Share of the texts encoded so far of which words or ids were cut, by tokenizer."""
        return {name: self._cut[name] / seen for name, seen in self._seen.items()}

    def report_on(self, texts: Iterable[str], lengths: Mapping[str, int]) -> list[str]:
        """What of these texts is not read, or hardly: a line each for the words' limit, each tokenizer's ids, unknown
        words and half characters; [] where all is well. Numbers only, never what the texts say.

        A word is unknown where a tokenizer knows no more of it than its letters: it then takes as many ids as a whole
        sentence may, and means nothing to the networks.
        """
        texts = list(texts)
        plains = [normalise(text) for text in texts]
        lines = []
        counts = [len(plain.split()) for plain in plains]
        most = max(counts, default=0) if self.report_words is None else self.report_words
        if over := [count for count in counts if count > most]:
            cut = sum(over) - most * len(over)
            lines.append(
                f"{_of(over, texts)} longer than {most} words: {cut} of {sum(over)} words are cut from the end"
            )
        for name, length in lengths.items():
            pairs = []  # ids read, and all ids, of the texts that have more than the room; C_T's own choice counts too
            for plain in plains:
                ids, whole = self._fitted(name, plain, length)
                if not whole and (name == "clip" or len(ids) == length - 2):
                    pairs.append((len(ids), len(self._ids(name, plain))))
            if pairs:
                read, there = (sum(column) for column in zip(*pairs, strict=True))
                sections = name == "clip" and any(impression_first(plain) for plain in plains)
                how = "impression and findings first" if sections else "from the beginning"
                lines.append(f"{_of(pairs, texts)} longer than {name} holds: {read} of {there} ids are read, {how}")
        words = [word for plain in plains for word in plain.split()]
        unknown = sum(any(self._is_unknown(name, word) for name in lengths) for word in words)
        if unknown:
            lines.append(f"{unknown} of {len(words)} words are unknown to this model; it reads them letter by letter")
        if halves := sum(len(SURROGATE.findall(text)) for text in texts):
            lines.append(f"{halves} bytes or half characters that are no Unicode became U+FFFD")
        return lines

    def _is_unknown(self, name: str, word: str) -> bool:
        if name in self._unknown_id and self._unknown_id[name] in self._ids(name, word):
            return True
        # Numbers and marks are single ids by design; only runs of letters can be unknown.
        runs = _LETTERS.findall(word)
        return any((count := len(self._ids(name, run))) > 1 and 2 * count > len(run) for run in runs)


def _of(some: Sequence, texts: Sequence[str]) -> str:
    return "the text is" if len(texts) == 1 else f"{len(some)} of {len(texts)} texts are"


def clip_ids(folder: epath.PathLike, texts: Sequence[str], length: int) -> Int32[np.ndarray, "texts n"]:
    """C_T's ids of short texts by the CLIP tokenizer of one folder alone, in the format above.

    Raises:
      UserError: there is no CLIP tokenizer in the folder.
    """
    backend = _load(epath.Path(folder), "clip")
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    begin, end = (backend.token_to_id(token) for token in (CLIP_BOS, CLIP_EOS))
    if None in (begin, end):
        raise UserError(f"{folder}: not a clip tokenizer: expected {CLIP_BOS} and {CLIP_EOS} in its vocabulary")
    out = np.full((len(texts), length), end, np.int32)
    for row, text in zip(out, texts, strict=True):
        ids = [i for w in normalise(text).split() for i in backend.encode(w, add_special_tokens=False).ids]
        ids = [begin, *ids[: length - 2], end]
        row[: len(ids)] = ids
    return out


def load_one(folder: epath.Path, name: str) -> hf.Tokenizer:
    """The tokenizer in one folder: "clip", "bert" or "gpt2".

    Raises:
      UserError: its files are missing, or what was read is not in the format above.
    """
    backend = _load(folder, name)
    size, at = backend.get_vocab_size(), backend.token_to_id
    holds, rule = {
        "clip": (at(CLIP_EOS) == size - 1 and at(CLIP_BOS) is not None, f"{CLIP_EOS} has the highest id"),
        "bert": (at("[PAD]") == 0 and None not in (at("[CLS]"), at("[SEP]")), "[PAD] has id 0, [CLS] and [SEP] exist"),
        "gpt2": (
            tuple(map(at, GPT2_SPECIAL)) == (size - 3, size - 2, size - 1),
            "<PAD>, <BOS>, <EOS> are the last three ids",
        ),
    }[name]
    if not holds:
        raise UserError(f"{folder}: not a {name} tokenizer: expected that {rule}")
    return backend


def _load(folder: epath.Path, name: str) -> hf.Tokenizer:
    classic = {"clip": ("vocab.json", "merges.txt"), "bert": ("vocab.txt",), "gpt2": ("vocab.json", "merges.txt")}[name]
    if (file := folder / "tokenizer.json").exists():
        try:
            backend = hf.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise UserError(f"{file}: not a tokenizer file ({error})") from error
    elif all((folder / file).exists() for file in classic):
        import transformers  # slow to import, and only the classic layout needs it

        kind = {"clip": "CLIPTokenizer", "bert": "BertTokenizer", "gpt2": "GPT2Tokenizer"}[name]
        options = {"do_lower_case": False, "strip_accents": False} if name == "bert" else {}
        try:
            loaded = getattr(transformers, kind).from_pretrained(str(folder), local_files_only=True, **options)
        except Exception as error:  # as above
            raise UserError(f"{folder}: {' + '.join(classic)} there are no tokenizer's files ({error})") from error
        backend = hf.Tokenizer.from_str(loaded.backend_tokenizer.to_str())  # without transformers' wrapped decode
    else:
        raise UserError(f"{folder}: no tokenizer there; expected tokenizer.json or {' + '.join(classic)}")
    if name == "gpt2":
        new = [token for token in GPT2_SPECIAL if backend.token_to_id(token) is None]
        backend.add_special_tokens([hf.AddedToken(token, special=True) for token in new])
    return backend


def _clip_backend(vocab: dict | None = None, merges: list | None = None) -> hf.Tokenizer:
    backend = hf.Tokenizer(
        models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=CLIP_EOS)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(hf.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(hf.Regex(CLIP_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _gpt2_backend(vocab: dict | None = None, merges: list | None = None) -> hf.Tokenizer:
    backend = hf.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _bert_backend(vocab: dict | None = None) -> hf.Tokenizer:
    backend = hf.Tokenizer(models.WordPiece(vocab or {}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _bpe(backend: hf.Tokenizer, texts: list[str], size: int, suffix: str, special: Sequence[str]) -> tuple[dict, list]:
    """Vocabulary and merges of byte-level BPE in the published order: bytes, bytes that end a word, merges, specials.

    `backend` is used up: it takes the bytes for special tokens. They are given as such since the trainer breaks ties
    by id and numbers what it is not told of in the order of a random hash.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = alphabet + ([byte + suffix for byte in alphabet] if suffix else [])
    options = {"end_of_word_suffix": suffix} if suffix else {}
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=2, special_tokens=base, show_progress=False, **options)
    backend.train_from_iterator(texts, trainer)
    vocab, merges = {token: i for i, token in enumerate(base)}, []
    for first, second in json.loads(backend.to_str())["model"]["merges"]:
        if len(vocab) >= size - len(special):
            break
        merges.append((first, second))
        vocab.setdefault(first + second, len(vocab))  # two merges may make the same token
    for token in special:
        vocab[token] = len(vocab)
    return vocab, merges


def _train_clip(texts: list[str], size: int) -> tuple[hf.Tokenizer, dict]:
    vocab, merges = _bpe(_clip_backend(), texts, size, "</w>", (CLIP_BOS, CLIP_EOS))
    backend = _clip_backend(vocab, merges)
    backend.add_special_tokens([CLIP_BOS, CLIP_EOS])
    backend.post_processor = processors.RobertaProcessing(
        (CLIP_EOS, vocab[CLIP_EOS]), (CLIP_BOS, vocab[CLIP_BOS]), trim_offsets=False, add_prefix_space=False
    )
    names = {"bos_token": CLIP_BOS, "eos_token": CLIP_EOS, "pad_token": CLIP_EOS, "unk_token": CLIP_EOS}
    return backend, {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **names}


def _train_gpt2(texts: list[str], size: int) -> tuple[hf.Tokenizer, dict]:
    special = ("<|endoftext|>", *GPT2_SPECIAL)
    backend = _gpt2_backend(*_bpe(_gpt2_backend(), [f" {text}" for text in texts], size, "", special))
    backend.add_special_tokens(list(special))
    names = {"bos_token": "<BOS>", "eos_token": "<EOS>", "pad_token": "<PAD>", "unk_token": "<|endoftext|>"}
    return backend, {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024, **names}


def _train_bert(texts: list[str], size: int) -> tuple[hf.Tokenizer, dict]:
    known = sorted(set(string.printable) - set(string.whitespace) - set(string.ascii_uppercase))
    count = Counter("".join(texts))
    others = sorted(set(count) - {*known, " "}, key=lambda character: (-count[character], character))
    drop = {ord(character): " " for character in others[size // 8 :]}  # the rarest are left to [UNK]
    kept = known + others[: size // 8]
    base = [*BERT_SPECIAL, *kept, *(f"##{character}" for character in kept)]  # told, for the reason given in _bpe
    learned = _bert_backend()
    trainer = trainers.WordPieceTrainer(vocab_size=size, min_frequency=2, special_tokens=base, show_progress=False)
    learned.train_from_iterator((text.translate(drop) for text in texts), trainer)
    words = learned.get_vocab()
    backend = _bert_backend({token: i for i, token in enumerate(sorted(words, key=words.__getitem__)[:size])})
    backend.add_special_tokens(list(BERT_SPECIAL))
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    options = {"do_lower_case": False, "strip_accents": False, "model_max_length": 512}
    return backend, {"tokenizer_class": "BertTokenizer", **options}
