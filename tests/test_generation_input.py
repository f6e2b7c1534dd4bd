"""What users pass by mistake is one clear InputError: what was got, what was expected. Types are not checked here."""

import io

import jaxtyping
import numpy as np
import pytest
from PIL import Image

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.conversation import Chat
from ml_mamba_jax.errors import InputError
from ml_mamba_jax.generation import answer_probabilities, generate, image_state, stream
from ml_mamba_jax.model import MLMamba
from ml_mamba_jax.prompt import Turn
from ml_mamba_jax.sampling import Sampling
from ml_mamba_jax.state import fork, init_state
from ml_mamba_jax.state_file import load_state, save_state
from tests.test_generate import IMAGES, TOKENIZER, weights
from tests.tiny_model import MODEL

PICTURE = Image.fromarray(IMAGES[0])


@pytest.fixture(autouse=True)
def without_type_checks(monkeypatch):
    """As users have it: the checks of the tests would come first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def ask(prompts=("hi",), images=None, tokenizer=TOKENIZER, **options):
    return generate(MODEL, weights(), tokenizer, prompts, images, **{"max_new_tokens": 3} | options)


def png() -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def truncated():
    return Image.open(io.BytesIO(png()[:2000]))


def closed():
    image = Image.open(io.BytesIO(png()))
    image.close()
    return image


STATE = init_state(MODEL.config.language, 1)

WRONG = {
    "number of prompts": (lambda: ask(5), "prompts: got int, expected a list of questions"),
    "prompt is a number": (lambda: ask(["a", 5]), r"prompts\[1\]: conversation: got int, expected a list of turns"),
    "prompt is None": (lambda: ask([None]), r"prompts\[0\]: conversation: got NoneType"),
    "prompt in a list": (lambda: ask([["hi"]]), r"prompts\[0\]: turn 0: got 'hi', expected Turn"),
    "turn is a dict": (lambda: ask([[{"role": "human", "text": "hi"}]]), r"turn 0: got \{.*, expected Turn"),
    "no turns": (lambda: ask([[]]), r"prompts\[0\]: conversation: got no turns"),
    "text is a number": (lambda: ask([[Turn("human", 3)]]), "turn 0: got Turn.*expected Turn"),
    "half a character": (
        lambda: ask(["\ud800 hi"]),
        r"prompts\[0\]: text: got '\\ud800' at character 9, half of a pair",
    ),
    "stream of a list": (lambda: list(stream(MODEL, weights(), TOKENIZER, ["hi"])), "turn 0: got 'hi', expected Turn"),
    "Chat of None": (lambda: Chat(MODEL, weights(), TOKENIZER).ask(None), r"turn 0: got .*None\), expected Turn"),
    "one image for two": (lambda: ask(["a", "b"], PICTURE), "got 2 prompts and 1 images, .* pass state=image_state"),
    "images is a number": (lambda: ask(["a"], 5), "images: got int, expected a list with an image or None"),
    "path that is not there": (lambda: ask(["a"], "cat.png"), r"cat\.png: found no such image file"),
    "truncated": (lambda: ask(images=[truncated()]), r"image: cannot decode the image \(image file is truncated\)"),
    "closed": (lambda: ask(images=[closed()]), r"image: cannot decode the image \(Operation on closed image\)"),
    "no pixels": (lambda: ask(images=[Image.new("RGB", (0, 5))]), "image: got 0 x 5 pixels, expected at least one"),
    "empty array": (
        lambda: ask(images=[np.zeros((0, 4, 3), np.uint8)]),
        "image: got 4 x 0 pixels, expected at least one",
    ),
    "bytes": (lambda: ask(images=[png()]), "image: got bytes, expected a file name"),
    "half a token": (
        lambda: ask(max_new_tokens=2.5),
        r"max_new_tokens: got 2\.5, expected a whole number of at least 1",
    ),
    "stop id": (lambda: ask(stop_ids=5), "stop_ids: got 5, expected a list of token ids"),
    "stop ids are texts": (lambda: ask(stop_ids=["a"]), r"stop_ids: got \['a'\], expected whole numbers"),
    "stop string": (lambda: ask(stop_strings=5), "stop_strings: got 5, expected a list of texts"),
    "stop strings are ids": (lambda: ask(stop_strings=[3]), r"stop_strings: got \[3\], expected a list of texts"),
    "seed": (lambda: ask(seed=None), "seed: got None, expected a whole number"),
    "large seed": (lambda: ask(seed=2**70), "seed: got 1180591620717411303424, expected .* at most 64 bits"),
    "sampling": (lambda: ask(sampling=None), "sampling: got NoneType, expected a Sampling"),
    "half a top_k": (lambda: Sampling(top_k=2.5), r"top_k: got 2\.5, expected a whole number"),
    "temperature": (lambda: Sampling(temperature="hot"), "temperature: got 'hot', expected a number"),
    "no tokenizer": (lambda: ask(tokenizer=None), "tokenizer: got NoneType, expected a Tokenizer; a folder without"),
    "state is a tuple": (lambda: ask(state=tuple(STATE)), "state: got tuple, expected a MambaState; load_state"),
    "state is a path": (lambda: ask(state="a.state"), "state: got str, expected a MambaState; load_state"),
    "stream from a path": (
        lambda: list(stream(MODEL, weights(), TOKENIZER, "hi", state="a.state")),
        "state: got str, expected a MambaState",
    ),
    "rows of a state": (lambda: ask(["a", "b"], state=fork(STATE, 3)), "state: got conv .* for 2 rows of this model"),
    "fork of a tuple": (lambda: fork(tuple(STATE), 2), "state: got tuple, expected a MambaState"),
    "config of the file": (
        lambda: load_state("x", MODEL.config.language),
        "config: got Mamba2Config, expected an MLMamba",
    ),
    "config to save": (lambda: save_state("x", STATE, MODEL.config.language), "config: got Mamba2Config, expected"),
    "one answer": (
        lambda: answer_probabilities(MODEL, weights(), TOKENIZER, ["hi"], answers=5),
        "answers: got 5, expected a list of at least two texts",
    ),
    "answers are ids": (
        lambda: answer_probabilities(MODEL, weights(), TOKENIZER, ["hi"], answers=[3, 4]),
        r"answers: got \[3, 4\], expected a list of at least two texts",
    ),
    "encoders alone": (
        lambda: generate(MLMamba(MLMambaConfig(None, MODEL.config.vision)), {}, TOKENIZER, ["hi"]),
        "model: got image encoders alone, expected a model with a language part",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line(name):
    call, message = WRONG[name]
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_what_is_obvious_is_done():
    options = {"max_new_tokens": np.int64(3), "seed": np.int32(0)}
    answer = ask(images=[IMAGES[0]])
    for one in (PICTURE, IMAGES[0], IMAGES[0][None], [PICTURE]):
        assert ask(images=one, **options) == answer
    assert ask(iter(["hi"]), images=iter([PICTURE]), stop_strings=None) == answer
    assert ask(stop_ids={5}, stop_strings=(s for s in ["x" * 50])) == ask(stop_ids=[5])
    grey = Image.fromarray(IMAGES[0]).convert("LA")
    assert ask(images=[grey.convert("La")]) == ask(images=[grey.convert("La").convert("LA")])
    assert ask(state=image_state(MODEL, weights(), PICTURE)) == answer
    probabilities = [
        answer_probabilities(MODEL, weights(), TOKENIZER, ["hi"], PICTURE, answers=a) for a in (["a", "b"], iter("ab"))
    ]
    np.testing.assert_array_equal(*probabilities)
    # An empty question is one, and a stop string that never comes stops nothing.
    assert ask([""])[0] and ask(images=[IMAGES[0]], stop_strings=["never seen"]) == answer
