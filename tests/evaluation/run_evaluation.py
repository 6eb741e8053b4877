"""Scores two folders with the toy extractor and writes the record; run by one or several processes."""

import sys

from accelerate import Accelerator

from diffadapt.evaluation.extractors import load_extractor
from diffadapt.evaluation.run import Reading, evaluate_sets
from diffadapt.evaluation.scoring import Plan


def score(generated, real, output):
    plan = Plan(("fid", "kid", "precision_recall", "vendi"), allow_small=True, intervals=False)
    reading = Reading(batch_size=4, skip_bad=True)
    extractors = [load_extractor("toy_extractor:Toy")]
    outcome = evaluate_sets({"a": str(generated)}, str(real), extractors, plan, reading=reading)
    if outcome is not None:
        outcome.record.write(output)


if __name__ == "__main__":
    Accelerator()  # knows from the environment which processes there are
    score(*sys.argv[1:])
