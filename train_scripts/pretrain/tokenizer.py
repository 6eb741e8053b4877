"""A CLIPTokenizer of 2,000 pieces, byte-level BPE learned from the captions.

    python train_scripts/pretrain/tokenizer.py --build BUILD

Writes BUILD/tokenizer, which stock `CLIPTokenizer.from_pretrained` opens. Words that fine-tuning prompts use
and the captions lack (`sks`, places, clothes) are read too, so that they are few pieces rather than letters.
"""

import argparse
import json
from pathlib import Path

from emoji_data import STYLES, captions
from scenes import COLOURS
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
LENGTH = 32  # pieces of a prompt, both ends counted; the longest caption of one emoji has 19
PROMPT_WORDS = """
sks cat dog monkey face photo picture drawing painting background style small large and next to with wearing
grinning smiling kissing crying weary tears joy heart eyes wry smile pouting happy sad angry scared beach snow
forest grass city space night hat party crown sunglasses scarf flower balloon fluent white
"""
PROMPT_WORD_REPEATS = 100  # so that they are as frequent as words of captions


def learn(texts: list[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary in CLIP's order (bytes, bytes at a word's end, merges, specials) and the merges."""
    alphabet = sorted(ByteLevel.alphabet())
    byte_pieces = alphabet + [f"{byte}</w>" for byte in alphabet]
    tokenizer = CLIPTokenizer(vocab={name: index for index, name in enumerate(SPECIAL)}).backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=size + len(byte_pieces),
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    merges = merges[: size - len(byte_pieces) - len(SPECIAL)]
    merged_pieces = ["".join(pair) for pair in merges]
    pieces = dict.fromkeys([*byte_pieces, *merged_pieces, *SPECIAL])
    return {piece: index for index, piece in enumerate(pieces)}, merges


def check_round_trip(tokenizer: CLIPTokenizer, texts: list[str]) -> None:
    """Every text must be what its tokens decode to, apart from spaces: CLIP reads digits one by one."""
    for text in texts:
        decoded = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
        assert decoded.replace(" ", "") == text.replace(" ", ""), text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, required=True, help="folder made by emoji_data.py")
    parser.add_argument("--size", type=int, default=2000)
    args = parser.parse_args()
    concepts = json.loads((args.build / "concepts.json").read_text(encoding="utf-8"))
    texts = []
    for row in concepts:
        for style in STYLES:
            texts += captions(row["names"], style)
    words = [*PROMPT_WORDS.split(), *COLOURS]
    vocab, merges = learn(texts + words * PROMPT_WORD_REPEATS, args.size)
    folder = args.build / "tokenizer"
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    check_round_trip(tokenizer, texts)
    longest = max(len(ids) for ids in tokenizer(texts).input_ids)
    print(f"{len(tokenizer)} pieces; longest caption {longest} pieces")
    for text in ("a sks cat face emoji", "a kissing cat on a beach", "zwx héllo"):
        print(text, "->", tokenizer.tokenize(text))


if __name__ == "__main__":
    main()
