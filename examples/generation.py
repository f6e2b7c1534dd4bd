# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Asking a model about pictures
#
# A notebook as a script (open it in Jupyter with [jupytext](https://jupytext.readthedocs.io), or run it with Python). It needs a
# folder with a model: `make demo` trains a small one that reads handwritten digits.

# %%
from pathlib import Path

import jax
import matplotlib.pyplot as plt

from ml_mamba_jax import (
    Chat,
    Sampling,
    Timing,
    answer_probabilities,
    fork,
    generate,
    image_state,
    load,
    load_state,
    quantize,
    read_image,
    save_state,
    stream,
)

RUN = Path("runs/digits-vqa")
model, params, tokenizer = load(RUN)
print(f"{sum(a.size for a in jax.tree.leaves(params)) / 1e6:.1f} million parameters on {jax.devices()[0].device_kind}")

# %%
picture = read_image(RUN / "example.png")
plt.imshow(picture)
plt.axis("off")
plt.savefig("picture.png")

# %% [markdown]
# ## One question, then many
#
# `generate` answers a batch of questions, each with its own picture or without one. The first call compiles; the second, with
# other questions of other lengths, does not.

# %%
questions = ["Which digit is at the top left?", "Is there a seven?", "Do you see a two?"]
timing = Timing()
for _ in range(2):
    answers = generate(model, params, tokenizer, questions, [picture] * len(questions), timing=timing)
    print(timing)
for question, answer in zip(questions, answers, strict=True):
    print(f"{question} {answer}")

# %% [markdown]
# ## As it is written

# %%
for piece in stream(model, params, tokenizer, "Which digit is at the top left?", picture):
    print(piece, end="", flush=True)
print()

# %% [markdown]
# ## The state is a value
#
# What the model has read is in a recurrent state of fixed size. Encode the picture once, and ask many questions from there; keep
# the state in a file for another day.

# %%
seen = image_state(model, params, picture)
print(f"{sum(a.nbytes for a in seen) / 1e3:.0f} kB, whatever was read")
again = generate(model, params, tokenizer, questions, state=seen)
assert again == answers

save_state("picture.state", seen, model.config, params)
seen = load_state("picture.state", model.config, params)  # refused where the parameters are others
three = fork(seen, 3)  # one row for each way to go on; `generate` does this by itself
assert generate(model, params, tokenizer, questions, state=three) == answers

# %% [markdown]
# ## How sure is it?

# %%
sure = answer_probabilities(model, params, tokenizer, ["Is there a seven?"], state=seen, answers=["Yes", "No"])
print(f"yes {sure[0, 0]:.0%}, no {sure[0, 1]:.0%}")

# %% [markdown]
# ## A conversation, and one that leaves it half-way

# %%
chat = Chat(model, params, tokenizer)
print(chat.ask("Which digit is at the top left?", picture))
other = chat.fork()
print(chat.ask("Is there a seven?"))
print(other.ask("Is there a six?", sampling=Sampling(temperature=0.7, top_p=0.9), seed=1))

# %% [markdown]
# ## With 8 bits a weight
#
# Less memory, and less to read for each token. The answers are roughly the same.

# %%
small = quantize(params)
print(generate(model, small, tokenizer, questions, [picture] * len(questions)))
