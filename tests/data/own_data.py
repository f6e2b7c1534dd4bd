"""Small data sets of one's own, as people keep them: json files beside folders of images."""

import json
from pathlib import Path

from PIL import Image


def write_images(folder: Path, names: list[str]) -> None:
    """Small images, each of another colour."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24 + i, 20), (40 * i % 256, 255 - 9 * i % 256, 7 * i % 256)).save(path)


def conversation(question: str, answer: str, *more: str) -> list[dict]:
    texts = (question, answer, *more)
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def write_llava(folder: Path, n_records: int, n_images: int = 3) -> tuple[Path, Path]:
    """A json list and its folder of images: every fourth record is text alone, lengths differ."""
    names = [f"coco/{i}.{('jpg', 'png')[i % 2]}" for i in range(n_images)]
    write_images(folder / "images", names)
    entries = []
    for i in range(n_records):
        entry = {"id": str(i), "conversations": conversation(f"What is {i}? " * (1 + i % 5), f"It is {i}.")}
        if i % 4:
            entry["image"] = names[i % n_images]
            entry["conversations"][0]["value"] = "<image>\n" + entry["conversations"][0]["value"]
        entries.append(entry)
    (folder / "chat.json").write_text(json.dumps(entries))
    return folder / "chat.json", folder / "images"
