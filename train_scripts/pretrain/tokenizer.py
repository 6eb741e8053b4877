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


def learn(texts: list[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary in CLIP's order (bytes, bytes at a word's end, merges, specials) and the merges."""
    alphabet = sorted(ByteLevel.alphabet())
    pieces = alphabet + [f"{byte}</w>" for byte in alphabet]
    tokenizer = CLIPTokenizer(vocab={name: index for index, name in enumerate(SPECIAL)}).backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=size + len(pieces),
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    merges = merges[: size - len(pieces) - len(SPECIAL)]
    names = pieces + ["".join(pair) for pair in merges] + SPECIAL
    return {name: index for index, name in enumerate(dict.fromkeys(names))}, merges


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, required=True, help="folder made by emoji_data.py")
    parser.add_argument("--size", type=int, default=2000)
    args = parser.parse_args()
    concepts = json.loads((args.build / "concepts.json").read_text(encoding="utf-8"))
    texts = [text for row in concepts for style in STYLES for text in captions(row["names"], style)]
    extra = [*PROMPT_WORDS.split(), *COLOURS]
    vocab, merges = learn(texts + extra * 100, args.size)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)
    tokenizer.save_pretrained(args.build / "tokenizer")
    (args.build / "tokenizer/vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (args.build / "tokenizer/merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    again = CLIPTokenizer.from_pretrained(args.build / "tokenizer")
    for text in texts:
        read = again.decode(again(text).input_ids, skip_special_tokens=True)
        assert read.replace(" ", "") == text.replace(" ", ""), text  # CLIP reads digits one by one
    print(f"{len(again)} pieces; longest caption {max(map(len, again(texts).input_ids))} pieces")
    for text in ("a sks cat face emoji", "a kissing cat on a beach", "zwx héllo"):
        print(text, "->", again.tokenize(text))


if __name__ == "__main__":
    main()
