"""A tokenizer.json gives the pieces that its maker's program gives; one that is a trap is refused, at once."""

import base64
import json
import shutil
import time
import unicodedata

import pytest
from golden import E2E, GOLDENS

from dailies.model import tokenizer as reading
from dailies.model.files import CheckpointError
from dailies.model.tokenizer import Tokenizer, new_tokenizer

UMT5 = GOLDENS / "umt5_tokenizer_a"
CASE = json.loads((UMT5 / "case.json").read_text())
T5 = E2E / "t5/tokenizer"


@pytest.mark.parametrize("case", CASE["cases"], ids=lambda case: case["folder"])
def test_rare_characters_get_the_files_own_unknown_piece_or_bytes(case):
    tokenizer = Tokenizer(UMT5 / case["folder"], "golden")
    assert [tokenizer.ids(text) for text in CASE["texts"]] == case["ids"]
    assert any(3 in ids for ids in case["ids"]) != case["byte_fallback"] and not any(2 in ids for ids in case["ids"])


def test_a_row_is_cut_to_its_limit_and_keeps_its_end_mark():
    tokenizer = Tokenizer(T5, "golden")
    whole = tokenizer.ids("a red fox " * 20)
    assert tokenizer.ids("a red fox " * 20, 7) == [*whole[:6], 1] and tokenizer.ids("", 7) == [1]
    ids, mask = tokenizer.padded(["a red fox", ""], "cpu")
    assert ids.tolist() == [tokenizer.ids("a red fox"), [1] + [0] * (ids.shape[1] - 1)]
    assert mask.sum(dim=1).tolist() == [ids.shape[1], 1]


def test_what_is_trained_here_can_be_read(tmp_path):
    new_tokenizer(["a red circle moves left"] * 9, pieces=60, folder=tmp_path)
    assert Tokenizer(tmp_path, "new").ids("a red circle")[-1] == 1


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(T5, tmp_path / "tokenizer")


def changed(folder, change, file="tokenizer.json"):
    said = json.loads((folder / file).read_text())
    change(said)
    (folder / file).write_text(json.dumps(said))


def refusal(folder):
    began = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(folder, "some-model")
    assert time.monotonic() - began < 60                # they would run for hours, or for ever
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 1500
    return str(caught.value)


def replacing(pattern, content, times=1):
    step = {"type": "Replace", "pattern": pattern, "content": content}
    return lambda said: said.update(normalizer={"type": "Sequence", "normalizers": [step] * times})


def charsmap(length, rest):
    return base64.b64encode(length.to_bytes(4, "little") + rest).decode()


def precompiled(table, times=1):
    step = {"type": "Precompiled", "precompiled_charsmap": table}
    return lambda said: said.update(normalizer={"type": "Sequence", "normalizers": [step] * times})


def growing(rounds):
    """Each round makes a text five times longer."""
    steps = [{"type": "NFKD"}]
    for _ in range(rounds):
        steps += [{"type": "Replace", "pattern": {"String": "\u0644"}, "content": "\ufdfa"}, {"type": "NFKD"}]
    return {"type": "Sequence", "normalizers": steps}


# what is checked must be what the library reads
SPLIT_TWICE = {"type": "Sequence", "normalizers": [{"type": "Whitespace"}], "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}]}


@pytest.mark.parametrize("change, said", [
    (replacing({"Regex": "(a+)+$"}, ""), "others can take for ever"),
    (replacing({"Regex": "(?:a|a)*b"}, ""), "others can take for ever"),
    (replacing({"String": "a"}, "aa", 12), "replaces a text by a longer one"),
    (replacing({"Regex": " {2,}"}, "x" * 10**6), "replaces a text by a longer one"),
    (replacing({"String": "a"}, "b", 17), "17 steps, where 16 are allowed"),
    (replacing({"String": ""}, "b"), "it looks for ''"),
    (lambda said: said.update(normalizer={"type": "Prepend", "prepend": "x" * 10**6}), "before a text"),
    (lambda said: said.update(normalizer={"type": "Python", "code": "1"}), "a step 'Python'"),
    (precompiled(charsmap(4, b"\0\0\0\0" + b"x" * 10**6 + b"\0")), "more than 256 bytes of one character"),
    (precompiled(charsmap(4, b"\0\0\0\0" + b"a" * 50 + b"\0"), 2), "a text becomes longer again and again"),
    (lambda said: said.update(normalizer=growing(3)), "a text becomes longer again and again"),
    (lambda said: said.update(normalizer=growing(6)), "a text becomes longer again and again"),
    (lambda said: said.update(normalizer=[{"type": "Prepend", "prepend": "\ufdfa" * 4}]), "does not hold a tokenizer"),
    (lambda said: said.update(normalizer={"type": "Sequence",
                                          "normalizers": [{"type": "Prepend", "prepend": "\ufdfa" * 4}] * 5}),
     "a text becomes longer again and again"),
    (lambda said: said.update(normalizer=growing(1), added_tokens=[said["added_tokens"][0] | {
        "id": 500 + at, "content": f"{at:05}" + "a" * 120, "normalized": True} for at in range(1000)]),
     "characters of the tokens that it adds"),
    (lambda said: said.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Metaspace", "replacement": chr(0x2581 + at), "prepend_scheme": "always", "split": True}
        for at in range(16)]}),
     "a text becomes longer again and again"),
    (lambda said: said.update(pre_tokenizer=SPLIT_TWICE), "its step Sequence says 'normalizers'"),
    (lambda said: said.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT_TWICE]}),
     "says 'normalizers'"),
    (lambda said: said.update(normalizer={"type": "Sequence", "pretokenizers": []}), "says 'pretokenizers'"),
    (lambda said: said.update(normalizer={"type": "NFC", "regex": "(x+x+)+y"}), "its step NFC says 'regex'"),
    (lambda said: said.update(normalizer={"type": "Sequence"}), "'normalizers' is missing"),
    (precompiled(charsmap(2**32 - 4, b"\0" * 8)), "replacements is damaged"),
    (precompiled("no base64!"), "does not hold a tokenizer"),
    (lambda said: said.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated",
                                             "invert": False}), "others can take for ever"),
    (lambda said: said.update(added_tokens=said["added_tokens"] * 4000), "may add at most 10,000 tokens"),
    (lambda said: said["added_tokens"][0].update(content="x" * 10**6), "must have 1 to 128 characters"),
    (lambda said: said["added_tokens"][0].update(content=""), "must have 1 to 128 characters"),
    (lambda said: said["added_tokens"][0].update(id=10**15), "must be from 0 to"),
    (lambda said: said["added_tokens"][0].update(id=True), "must be from 0 to"),
    (lambda said: said["model"].update(unk_id=10**15), "its unknown piece must be one of its 137"),
    (lambda said: said["model"].update(unk_id=None), "its unknown piece must be one of its 137"),
    (lambda said: said["model"].update(type="WordPiece"), "must be Unigram or BPE, not 'WordPiece'"),
    (lambda said: said["model"].update(dropout=0.5), "other pieces of a text each time"),
    (lambda said: said["model"]["vocab"].append(["x" * 300, 0.0]), "texts of at most 256 characters"),
    (lambda said: said["model"]["vocab"].append(["y", float("nan")]), "must be numbers"),
    (lambda said: said["model"]["vocab"].append(["y", True]), "must be numbers"),
    (lambda said: said["model"].update(vocab={"a": 10**15}), "not one of its kind"),
    (lambda said: said.update(model={"type": "BPE", "vocab": {"a": 10**15}, "merges": []}), "must be whole, from 0 to"),
    (lambda said: said.update(model={"type": "BPE", "vocab": {"a": 1, "b": 1}, "merges": []}), "have one number"),
    (lambda said: said.update(post_processor=None), "must be a TemplateProcessing"),
    (lambda said: said["post_processor"].update(single=said["post_processor"]["single"] * 10**5), "more than 8 pieces"),
    (lambda said: said["post_processor"].update(single=said["post_processor"]["single"][:1]), "must put </s> behind"),
    (lambda said: said.update(auto_map={"AutoTokenizer": ["evil.Evil", None]}), "has auto_map: it names code"),
    (lambda said: said.clear(), "'model' is missing"),
])
def test_a_tokenizer_that_is_a_trap_is_refused(folder, change, said):
    changed(folder, change)
    assert said in refusal(folder)


@pytest.mark.parametrize("content, said", [
    (b"[" * 10**6, "is not JSON"), (b"[" * 2 * 10**6, "more than 1,500,000 lists"),
    (b"[]", "does not hold a tokenizer"),
    (b"\xff", "is not JSON"), (b'{"model":' + b"9" * 5000 + b"}", "is not JSON"),
    (b" " * 40_000_001, "is longer than")])
def test_a_file_that_is_no_such_table_is_refused(folder, content, said):
    (folder / "tokenizer.json").write_bytes(content)
    assert said in refusal(folder)


def test_a_vocabulary_beyond_every_model_is_refused(folder, monkeypatch):
    monkeypatch.setattr(reading, "PIECES", 136)
    assert "it has 137 pieces, where 136 are allowed" in refusal(folder)


def test_padding_truncation_and_decoder_of_the_file_are_not_taken(folder):
    before = Tokenizer(folder, "m").ids("a red fox")
    changed(folder, lambda said: said.update(
        truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}, decoder={"x": 1},
        padding={"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "<pad>"}))
    assert Tokenizer(folder, "m").ids("a red fox") == before


def test_code_in_the_folder_is_named_and_neither_asked_about_nor_run(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    changed(folder, lambda said: said.update(auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
                                             tokenizer_class="Evil"), "tokenizer_config.json")
    assert "tokenizer_config.json has auto_map" in refusal(folder)


def test_a_sentencepiece_model_alone_is_told_what_is_missing(folder):
    (folder / "tokenizer.json").unlink()
    assert "only a spiece.model" in refusal(folder)


def test_a_table_that_makes_a_text_much_longer_is_refused_before_it_is_cut_into_pieces(folder):
    """A trie of one entry: a becomes 256 b. Units of the trie are an offset, a label, and whether there is a value."""
    units = [0] * 512
    units[0] = 256 << 10
    units[256 ^ ord("a")] = (256 ^ ord("a") ^ 1) << 10 | 1 << 8 | ord("a")
    units[1] = 1 << 31
    trie = b"".join(unit.to_bytes(4, "little") for unit in units)
    changed(folder, precompiled(charsmap(len(trie), trie + b"b" * 256 + b"\0")))
    tokenizer = Tokenizer(folder, "m")
    tokenizer.made = Uncut(tokenizer.made)
    with pytest.raises(CheckpointError, match="its normalizer makes 2,048,000 characters of 8,000"):
        tokenizer.ids("a" * 8000)


class Uncut:
    """A tokenizer that is not asked for pieces."""

    def __init__(self, made):
        self.normalizer = made.normalizer


def test_the_character_that_unicode_makes_longest_is_borne():
    text = "\ufdfa" * 2000
    assert len(unicodedata.normalize("NFKC", text)) == 18 * len(text) and Tokenizer(T5, "golden").ids(text)[-1] == 1
