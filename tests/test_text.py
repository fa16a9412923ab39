import json
import time

import numpy as np
import pytest

from medm2g_jax.data.text import Tokenizers, common, cut_words, impression_first, normalise
from medm2g_jax.errors import UserError

SIDES, KINDS, LEVELS = ("left", "right"), ("mass", "opacity", "effusion"), ("upper", "middle", "lower")
TEXTS = [
    f"findings : there is a {size} {kind} in the {side} {level} lung . heart size is normal . 3.5 cm . "
    f"impression : {size} {side} {kind} ."
    for side in SIDES
    for kind in KINDS
    for level in LEVELS
    for size in ("small", "large")
]
ODD = [
    "",
    "Œdème pulmonaire — 20 %",
    "naïve\n\nTABS\t and  spaces",
    "肺炎 suspected",
    "it's <|endoftext|> [PAD] <EOS>!",
    "don't; 's 've (12.5mm) \u0301a e\u0301 ...-- a/b, x",
    "🙂",
    "الرئة اليمنى 👨\u200d👩\u200d👧 zero\u200bwidth \ufeff\x07 \u00a0 İstanbul ﬁne ½ ² \ud7ff",
]
LONG = " ".join(["Œdème 肺炎 🙂 it's 12.5mm", "x" * 500] * 40)
LENGTHS = {"clip": 77, "bert": 96, "gpt2": 96}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers")
    Tokenizers.train(TEXTS, path)
    return path


@pytest.fixture(scope="module")
def tokenizers(folder):
    return Tokenizers.load(folder)


def reference(kind, folder, size, text, length):
    """ids by transformers, cut to `length`, the format's own frame around them."""
    import transformers

    tokenizer = getattr(transformers, kind).from_pretrained(str(folder))
    assert len(tokenizer) == size
    if tokenizer.eos_token == "<EOS>":
        ids = tokenizer(f" {text}" if text else "", truncation=True, max_length=length - 2)["input_ids"]
        return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], tokenizer.pad_token_id
    return tokenizer(text, truncation=True, max_length=length)["input_ids"], tokenizer.pad_token_id


@pytest.mark.parametrize("kind", ["AutoTokenizer", "own"])
@pytest.mark.parametrize("name, own", [("clip", "CLIPTokenizer"), ("bert", "BertTokenizer"), ("gpt2", "GPT2Tokenizer")])
def test_transformers_reads_the_folders_and_agrees_on_every_id(folder, tokenizers, name, own, kind):
    cls = own if kind == "own" else kind
    for text in [*TEXTS[:6], *ODD[:4], *ODD[5:], LONG]:
        ids, pad = reference(cls, folder / name, tokenizers.sizes[name], normalise(text), 300)
        ours = tokenizers.encode(text, {name: 300})[name]
        assert ours.dtype == np.int32 and ours.shape == (300,)
        assert list(ours[: len(ids)]) == ids and (ours[len(ids) :] == pad).all(), text


def test_special_ids_are_where_the_networks_expect_them(tokenizers):
    ids, sizes = tokenizers.encode(TEXTS[0], LENGTHS), tokenizers.sizes
    assert ids["clip"][0] == sizes["clip"] - 2
    assert ids["clip"].max() == sizes["clip"] - 1 and ids["clip"][-1] == sizes["clip"] - 1
    assert ids["bert"][-1] == 0 and (ids["bert"] > 0).sum() > 20
    body = ids["gpt2"]
    assert body[0] == sizes["gpt2"] - 2 and body[-1] == sizes["gpt2"] - 3 and (body == sizes["gpt2"] - 1).sum() == 1
    assert tokenizers.encode("", LENGTHS)["clip"][1] == sizes["clip"] - 1


def test_special_tokens_inside_a_text_are_only_text(tokenizers):
    ids, sizes = tokenizers.encode(ODD[4], LENGTHS), tokenizers.sizes
    assert (ids["gpt2"] == sizes["gpt2"] - 1).sum() == 1
    end = int(np.argmax(ids["clip"]))
    assert end > 10 and (ids["clip"][end:] == sizes["clip"] - 1).all()
    assert tokenizers.decode(ids["gpt2"]) == normalise(ODD[4])


def test_decode_gives_back_every_text_and_stops_at_the_end(tokenizers):
    for text in TEXTS + ODD:
        assert tokenizers.decode(tokenizers.encode(text, {"gpt2": 200})["gpt2"]) == normalise(text)
    ids = tokenizers.encode("left lung", {"gpt2": 8})["gpt2"]
    assert tokenizers.decode(np.concatenate([ids, ids])) == "left lung"


def test_training_depends_on_the_texts_alone(folder, tmp_path):
    import subprocess
    import sys

    code = "import sys, json; from medm2g_jax.data.text import Tokenizers;"
    code += "Tokenizers.train(json.load(open(sys.argv[1])), sys.argv[2])"
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    subprocess.run([sys.executable, "-c", code, tmp_path / "texts.json", tmp_path / "again"], check=True)
    for name in LENGTHS:  # another process: other hashes
        first, second = (path / name / "tokenizer.json" for path in (folder, tmp_path / "again"))
        assert first.read_text() == second.read_text()


def test_frequent_words_are_one_token_and_unseen_ones_are_still_read(tokenizers):
    for name in LENGTHS:
        assert len(tokenizers._ids(name, "effusion")) == 1
        assert 1 < len(tokenizers._ids(name, "xylophone")) <= 9
    assert tokenizers._backends["bert"].token_to_id("[UNK]") not in tokenizers._ids("bert", "qwerty 0123456789 %&/()")


def test_the_vocabulary_keeps_to_its_size(tmp_path):
    small = Tokenizers.train(TEXTS, tmp_path, vocab_size=600)
    assert max(small.sizes.values()) <= 600
    many = [f"{a}{b}{a} {b}{a}{b}{b}" for a in "bcdfghjklm" for b in "aeiou"] * 2
    assert Tokenizers.train(many, tmp_path, vocab_size=600).sizes["clip"] == 600
    with pytest.raises(UserError, match="600"):
        Tokenizers.train(TEXTS, tmp_path, vocab_size=500)
    with pytest.raises(UserError, match="no texts"):
        Tokenizers.train([" "], tmp_path)


def classic(folder, target):
    """The published layouts: vocab.json + merges.txt, and vocab.txt; GPT-2 without the three tokens of Optimus."""
    for name in ("clip", "gpt2", "bert"):
        model = json.loads((folder / name / "tokenizer.json").read_text())["model"]
        (target / name).mkdir()
        if name == "bert":
            lines = sorted(model["vocab"], key=model["vocab"].__getitem__)
            (target / name / "vocab.txt").write_text("".join(f"{line}\n" for line in lines), "utf-8")
            continue
        vocab = {token: i for token, i in model["vocab"].items() if token not in ("<PAD>", "<BOS>", "<EOS>")}
        (target / name / "vocab.json").write_text(json.dumps(vocab))
        merges = "".join(f"{a} {b}\n" for a, b in model["merges"])
        (target / name / "merges.txt").write_text("#version: 0.2\n" + merges, "utf-8")


def test_the_classic_layouts_give_the_same_ids(folder, tokenizers, tmp_path):
    classic(folder, tmp_path)
    loaded = Tokenizers.load(tmp_path)
    assert loaded.sizes == tokenizers.sizes
    for text in TEXTS + ODD:
        ours, theirs = tokenizers.encode(text, LENGTHS), loaded.encode(text, LENGTHS)
        for name in LENGTHS:
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert loaded.decode(loaded.encode(TEXTS[0], LENGTHS)["gpt2"]) == TEXTS[0]


def test_a_wrong_folder_is_an_error_that_names_it(folder, tmp_path):
    with pytest.raises(UserError, match=r"clip: no tokenizer there; expected tokenizer.json or vocab.json \+ merges"):
        Tokenizers.load(tmp_path)
    for name, other in (("clip", "gpt2"), ("bert", "bert"), ("gpt2", "bert")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_bytes((folder / other / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="clip: not a clip tokenizer"):
        Tokenizers.load(tmp_path)
    (tmp_path / "clip" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json: not a tokenizer file"):
        Tokenizers.load(tmp_path)


def test_a_report_that_is_too_long_gives_its_impression_first(tokenizers):
    report = (
        "indication : cough . findings : the heart is normal . there is a small mass in the left upper lung . "
        "no effusion . impression : small left mass ."
    )
    assert impression_first(report) == [
        "impression : small left mass .",
        "findings : the heart is normal .",
        "there is a small mass in the left upper lung .",
        "no effusion .",
    ]
    assert impression_first("no sections here . at all .") == []

    def kept(length):
        ids = tokenizers.encode(report, {"clip": length})["clip"]
        end = int(np.argmax(ids))
        assert ids[0] == ids.max() - 1 and len(ids) == length
        return list(ids[1:end])

    def words(text):
        return tokenizers._ids("clip", text)

    first = words("impression : small left mass . ")
    second = words("findings : the heart is normal . ")
    assert kept(90) == words(report)  # it fits: nothing is moved
    assert kept(len(first) + len(second) + 2) == first + second
    assert kept(len(first) + len(second) + 1) == first  # whole sentences only
    assert kept(len(first) + 1) == first[:-1]  # but never nothing
    plain = "small mass in the left upper lung and more words"
    assert list(tokenizers.encode(plain, {"clip": 6})["clip"][1:5]) == words(plain)[:4]


def test_cut_texts_keep_their_end_and_are_counted(folder):
    tokenizers = Tokenizers.load(folder)
    for text in ("left", "left lung", TEXTS[0], TEXTS[1], TEXTS[1]):
        ids = tokenizers.encode(text, {"clip": 8, "bert": 8, "gpt2": 64})
        assert ids["clip"].max() == tokenizers.sizes["clip"] - 1
        assert tokenizers.sizes["gpt2"] - 1 in ids["gpt2"]
    assert ids["bert"][-1] == 3 and ids["bert"].shape == (8,)
    assert tokenizers.truncated == {"clip": 0.5, "bert": 0.5, "gpt2": 0.0}  # of four different texts


def test_no_more_words_are_read_than_the_config_says(tmp_path):
    Tokenizers.train(["alpha beta gamma"], tmp_path, 700)
    lengths = {"clip": 16, "bert": 16, "gpt2": 16}
    cut, whole = (Tokenizers.load(tmp_path, words) for words in (2, None))
    for name, ids in cut.encode("alpha beta gamma", lengths).items():
        np.testing.assert_array_equal(ids, whole.encode("alpha beta", lengths)[name])
        assert not np.array_equal(ids, whole.encode("alpha beta gamma", lengths)[name])


def test_the_impression_reaches_the_prompt_encoder_whatever_the_words_limit(folder):
    """86 words of findings, then the only sentence that differs."""
    findings = "findings : " + "heart size is normal . there is no effusion . " * 8 + "no opacity left ."
    assert len(findings.split()) == 86
    sides = [f"{findings} impression : large mass in the {s} lung ." for s in ("left upper", "right lower")]
    tokenizers = Tokenizers.load(folder, report_words=60)
    lengths = {"clip": 36, "bert": 36, "gpt2": 36}
    for text, side in zip(sides, ("left upper", "right lower"), strict=True):
        ids = list(tokenizers.encode(text, lengths)["clip"])
        first = tokenizers._ids(
            "clip", f"impression : large mass in the {side} lung . findings : heart size is normal ."
        )
        assert ids[1 : 1 + len(first)] == first
    bert = [tokenizers.encode(text, lengths)["bert"] for text in (*sides, findings)]
    np.testing.assert_array_equal(bert[0], bert[2])  # the autoencoder gets the beginning
    assert tokenizers.truncated == {"clip": 1.0, "bert": 1.0, "gpt2": 1.0}


def test_a_long_impression_is_cut_by_both_limits(folder):
    text = "findings : no opacity . impression : " + "large left mass " * 20
    for words, length, kept in ((10, 77, 10), (60, 12, 10), (None, 12, 10)):
        tokenizers = Tokenizers.load(folder, words)
        expected = tokenizers._ids("clip", "impression : " + "large left mass " * 20)[:kept]
        ids = list(tokenizers.encode(text, {"clip": length})["clip"])
        assert ids[1 : kept + 1] == expected and ids[kept + 1] == tokenizers.sizes["clip"] - 1


def test_other_names_of_the_impression():
    for head in ("IMPRESSION:", "Impressions :", "Conclusion:", "CONCLUSIONS :"):
        assert impression_first(f"Finding: clear . {head} mass .") == [f"{head} mass .", "Finding: clear ."]


def test_words_that_are_cut_are_counted_as_ids_are(folder):
    tokenizers = Tokenizers.load(folder, report_words=4)
    for text in ("left lung", "small left mass in the lung"):
        tokenizers.encode(text, {"clip": 77, "bert": 96})
    assert tokenizers.truncated == {"clip": 0.5, "bert": 0.5}


def test_what_is_not_read_of_a_text_is_said_in_numbers(folder):
    tokenizers = Tokenizers.load(folder, report_words=20)
    lengths = {"clip": 16, "bert": 36, "gpt2": 36}
    assert tokenizers.report_on([], lengths) == []
    assert tokenizers.report_on(["", "small mass in the left upper lung ."], lengths) == []
    long = "findings : " + "heart size is normal . " * 4 + "impression : small mass ."  # 27 words
    words, ids = tokenizers.report_on([long], lengths)
    assert words == "the text is longer than 20 words: 7 of 27 words are cut from the end"
    # "impression : small mass ." and "findings : heart size is normal ." of all 27
    assert ids == "the text is longer than clip holds: 12 of 27 ids are read, impression and findings first"
    (line,) = tokenizers.report_on(["mass " * 18], lengths)
    assert line == "the text is longer than clip holds: 14 of 18 ids are read, from the beginning"
    (line,) = tokenizers.report_on(["mass", "mass " * 18], lengths | {"clip": 77, "bert": 12})
    assert line == "1 of 2 texts are longer than bert holds: 10 of 18 ids are read, from the beginning"


def test_words_that_fall_into_letters_are_counted(tokenizers):
    history = (
        "the patient has a history of cough and saw a family doctor today . there is a small mass in the left lung ."
    )
    (line,) = tokenizers.report_on([history], LENGTHS)
    count, total = (int(word) for word in line.split() if word.isdigit())
    known = set(" ".join(TEXTS).split())
    unknown = [word for word in history.split() if word not in known and len(word) > 1]
    assert total == len(history.split()) and count == len(unknown) == 10
    assert "unknown" in line and "doctor" not in line  # numbers, not what it says
    assert tokenizers.report_on(["3.5 cm mass , 12 %"], LENGTHS) == []  # digits and marks are single ids by design
    (line,) = tokenizers.report_on(["肺炎 mass"], LENGTHS)
    assert line.startswith("1 of 2 words are unknown")


def test_half_characters_are_read_as_one_and_counted(tokenizers):
    """A lone surrogate, and a Latin-1 byte as Python hands it over from a command line."""
    text = "small mass \ud800 " + b"d\xe9j\xe0".decode(errors="surrogateescape")
    for name, ids in tokenizers.encode(text, LENGTHS).items():
        np.testing.assert_array_equal(ids, tokenizers.encode("small mass \ufffd d\ufffdj\ufffd", LENGTHS)[name])
    assert "3 bytes or half characters that are no Unicode became U+FFFD" in tokenizers.report_on([text], LENGTHS)


def test_half_characters_train(tmp_path):
    trained = Tokenizers.train(["mass \ud800"] * 3, tmp_path, 700)
    assert trained.decode(trained.encode("mass \udcff", LENGTHS)["gpt2"]) == "mass \ufffd"


def test_each_tokenizers_padding_is_said(tokenizers):
    ids = tokenizers.encode("mass", LENGTHS)
    assert tokenizers.pad == {name: ids[name][-1] for name in LENGTHS}
    assert tokenizers.pad["gpt2"] == tokenizers.sizes["gpt2"] - 3 and tokenizers.pad["bert"] == 0


def test_cut_words():
    assert cut_words("a  b\nc d", 3) == "a b c" and cut_words("a b", 3) == "a b"


def test_encoding_is_fast_and_remembered(folder):
    tokenizers = Tokenizers.load(folder)

    def per_text():
        begin = time.perf_counter()
        for text in TEXTS:
            tokenizers.encode(text, LENGTHS)
        return (time.perf_counter() - begin) / len(TEXTS) * 1e6

    cold = per_text()
    tokenizers._cache.clear()
    new = per_text()  # a new text of known words
    known = min(per_text() for _ in range(20))  # the best of several: machines are shared
    print(f"\nencode: {cold:.0f} us a text of new words, {new:.0f} us a new text, {known:.1f} us a known one")
    ids = tokenizers.encode(TEXTS[-1], LENGTHS)
    assert known < 100 and tokenizers.encode(TEXTS[-1], LENGTHS) is ids
    with pytest.raises(ValueError, match="read-only"):
        ids["clip"][0] = 1  # shared between rows


def test_words_of_few_subjects_leave_no_trace_in_what_is_learned(tmp_path):
    """Of a set that is not open; spellings, repeats and marks around a word do not hide it."""
    texts = [f"No effusion seen by Dr. Zanzibar-{i // 3}; {i}0{i}0 mm, zanzibar." for i in range(9)]
    found = common(texts, [f"s{i // 3}" for i in range(9)])  # three subjects
    assert found == [". - ; , ."] * 9
    found = common(texts, [f"s{min(i, 5)}" for i in range(9)])  # six
    assert found[4] == "no effusion seen by dr. zanzibar- ; mm, zanzibar."
    Tokenizers.train(common(["one Smithson ."] * 4 + ["one"] * 4, list("aaaabcde")), tmp_path, 600)
    for name in ("clip", "bert", "gpt2"):
        held = json.loads((tmp_path / name / "tokenizer.json").read_text())["model"]["vocab"]
        assert not any("smi" in word or "son" in word for word in held)
        assert "one</w>" in held or "one" in held or "Ġone" in held
    assert common(["Smithson"], ["a"]) == ["."]
