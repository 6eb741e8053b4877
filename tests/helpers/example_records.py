"""Records of evaluations to make pages and comparisons of."""

from PIL import Image, ImageDraw

from diffadapt.evaluation.record import EvaluationRecord, ExtractorSummary, ImageRow, Score, SetSummary
from diffadapt.metrics.intervals import Interval

IDENTITY = {
    "metric": "kid",
    "metric_version": "1",
    "extractor": "embedded:clip",
    "extractor_sha256": "ab" * 32,
    "preset": "crop-64",
    "layer": "image",
    "reference": "cd" * 32,
    "options": {},
    "n_generated": 30,
    "n_real": 40,
    "seed": 0,
}


def record(
    labels=("lora", "flora"), *, count=30, shift=0.0, smoke=False, demo=True, **identity
) -> EvaluationRecord:
    """Two sets with a score each, and a row per image; `shift` moves all their figures."""
    scores = tuple(
        Score(
            "kernel_distance[embedded:clip]",
            "kid",
            label,
            0.02 + shift + 0.01 * place,
            Interval(0.01 + shift + 0.01 * place, 0.03 + shift + 0.01 * place, "normal"),
            n={"generated": count, "real": 40},
            floor=0.001,
            better="lower",
            identity={**IDENTITY, **identity},
        )
        for place, label in enumerate(labels)
    )
    rows = tuple(
        ImageRow(
            label,
            f"{label}-{i:03d}.png",
            {"realism": round(0.5 + 0.01 * i + shift, 6), "nearest_similarity": 1 - 0.01 * i},
            nearest=f"real-{i % 7}.png",
            prompt=f"a <b>cat</b> & number {i}",
            seed=i,
        )
        for label in labels
        for i in range(count)
    )
    sets = {
        label: SetSummary(
            "generated",
            f"runs/{label}",
            "folder",
            count,
            "ef" * 32,
            {"PNG": count},
            made={
                "run": {"parameters": 1000 * (place + 1), "seconds": 60.0 - place, "peak_memory_bytes": 10**9}
            },
        )
        for place, label in enumerate(labels)
    }
    sets["reference"] = SetSummary("real", "photos", "folder", 40, "cd" * 32)
    return EvaluationRecord(
        scores,
        sets,
        (ExtractorSummary("embedded:clip", "ab" * 32, "crop-64", 64, ("image",), smoke=smoke),),
        seeds={"metrics": 0},
        versions={"torch": "2"},
        warnings=("JPEG against <PNG>",),
        images=rows,
        refused={"lora: fid": "30 images, needs 128"},
        settings={"command": "python eval/image_quality.py", "demo": demo},
    )


def load_image(label: str, name: str) -> Image.Image:
    """A disc, of another colour for every image, 64 pixels wide; real images are 300."""
    side = 300 if label == "reference" else 64
    image = Image.new("RGB", (side, side), "white")
    value = sum(name.encode()) * 37
    colour = (value % 256, value // 3 % 256, value // 7 % 256)
    ImageDraw.Draw(image).ellipse((side // 8, side // 8, side * 7 // 8, side * 7 // 8), fill=colour)
    return image
