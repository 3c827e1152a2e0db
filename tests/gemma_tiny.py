"""A tiny Gemma 3 in its published folder: the weights of a golden, and a tokenizer in Gemma's manner for 64 pieces."""

import json

from dailies.model import checkpoint

LETTERS = "abcdefghijklmnopqrstuvwxyz.,"
MERGES = [("▁", "a"), ("▁", "f"), ("o", "x"), ("▁f", "ox"), ("r", "e"), ("re", "d"), ("▁", "red")]


def tokenizer_json():
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *LETTERS, *("".join(pair) for pair in MERGES)]
    special = [dict(id=number, content=pieces[number], single_word=False, lstrip=False, rstrip=False,
                    normalized=False, special=True) for number in range(4)]
    return dict(
        version="1.0", truncation=None, padding=None, added_tokens=special,
        normalizer=dict(type="Replace", pattern=dict(String=" "), content="▁"),
        pre_tokenizer=dict(type="Split", pattern=dict(String=" "), behavior="MergedWithPrevious", invert=False),
        post_processor=dict(
            type="TemplateProcessing", single=[dict(SpecialToken=dict(id="<bos>", type_id=0)),
                                               dict(Sequence=dict(id="A", type_id=0))],
            pair=[dict(Sequence=dict(id="A", type_id=0)), dict(Sequence=dict(id="B", type_id=1))],
            special_tokens={"<bos>": dict(id="<bos>", ids=[2], tokens=["<bos>"])}),
        decoder=None,
        model=dict(type="BPE", dropout=None, unk_token="<unk>", continuing_subword_prefix=None,
                   end_of_word_suffix=None, fuse_unk=True, byte_fallback=False, ignore_merges=False,
                   vocab={piece: number for number, piece in enumerate(pieces)},
                   merges=[list(pair) for pair in MERGES]))


def gemma_folder(golden, folder, *, prefix="language_model.model.", **changes):
    """prefix: of the names, in one of the styles that Gemma is published in.  changes: of its config's text part."""
    folder.mkdir(parents=True, exist_ok=True)
    file = golden.folder / "weights_text_encoder.safetensors"
    tensors, metadata = checkpoint.unpack(file.read_bytes())
    checkpoint.save(folder / "model.safetensors", {name.replace("language_model.model.", prefix): tensor
                                                   for name, tensor in tensors.items()})
    text = json.loads(metadata["config"]) | changes
    (folder / "config.json").write_text(json.dumps(dict(model_type="gemma3", text_config=text)))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    return folder
