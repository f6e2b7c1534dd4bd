"""Ask a model about an image: `python -m ml_mamba_jax.chat CHECKPOINT --image FILE [--prompt TEXT]`.

With `--prompt` it answers once; without, it holds a conversation. Answers go to stdout, everything else to stderr.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from ml_mamba_jax import checkpoint
from ml_mamba_jax.arguments import OneLineParser
from ml_mamba_jax.conversation import Chat
from ml_mamba_jax.errors import CheckpointError, InputError, one_line_errors
from ml_mamba_jax.image import read_image
from ml_mamba_jax.quantization import quantize
from ml_mamba_jax.sampling import Sampling
from ml_mamba_jax.timing import Timing

HELP = """\
/image FILE   start a new conversation about an image
/reset        start a new conversation about the same image
/help         this list
/quit         leave, as Ctrl-D does; Ctrl-C cuts an answer short
anything else is a question"""


def main(arguments: Sequence[str] | None = None) -> None:
    with one_line_errors():
        args = _parser().parse_args(arguments)
        # Everything that can be wrong with the input is looked at before the slow part.
        sampling = Sampling(
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
        )
        if args.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens: got {args.max_new_tokens}, expected at least 1")
        image = None if args.image is None else read_image(args.image)
        chat = _load(args.checkpoint, args.int8)
        options = {
            "sampling": sampling,
            "max_new_tokens": args.max_new_tokens,
            "seed": args.seed,
            "stop_strings": args.stop,
        }
        if args.prompt is not None:
            _answer(chat, args.prompt, image, options)
        else:
            _converse(chat, image, options)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser("python -m ml_mamba_jax.chat", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawTextHelpFormatter
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="folder of a run or of converted weights")
    add("--image", metavar="FILE", help="what the conversation is about")
    add("--prompt", metavar="TEXT", help="answer this and exit; default: a conversation")
    add("--temperature", metavar="T", type=float, default=0.0, help="0 takes the likeliest token (default)")
    add("--top-k", metavar="K", type=int, help="choose among the K likeliest tokens")
    add("--top-p", metavar="P", type=float, help="choose among the likeliest tokens that add up to P")
    add("--min-p", metavar="P", type=float, help="choose among tokens at least P times as likely as the likeliest")
    add("--repetition-penalty", metavar="R", type=float, default=1.0, help="above 1: avoid what was said (default 1)")
    add("--stop", metavar="TEXT", action="append", default=[], help="end the answer before this text; may be repeated")
    add("--max-new-tokens", metavar="N", type=int, default=256, help="longest answer (default 256)")
    add(
        "--int8", action="store_true", help="language model with 8 bits a weight: less memory, roughly the same answers"
    )
    add("--seed", metavar="S", type=int, default=0, help="of the sampling (default 0)")
    return parser


def _load(folder: str, int8: bool) -> Chat:
    start = time.perf_counter()
    if checkpoint.load_config(folder).language is None:
        raise CheckpointError(
            f"{folder}: holds image encoders alone, expected a model with a language part; choose another"
        )
    model, params, tokenizer = checkpoint.load(folder)
    if tokenizer is None:
        raise CheckpointError(f"{folder}: found no tokenizer.json, expected that of the model; copy it there")
    if int8:
        params = quantize(params, donate=True)
    _note(f"loaded {folder} in {time.perf_counter() - start:.1f} s")
    return Chat(model, params, tokenizer)


def _answer(chat: Chat, question: str, image, options: dict) -> None:
    """Write the answer as it comes, then how long it took."""
    timing = Timing()
    try:
        for piece in chat.stream(question, image, timing=timing, **options):
            print(piece, end="", flush=True)
    finally:
        print(flush=True)
    _note(str(timing))


def _converse(chat: Chat, image, options: dict) -> None:
    _note("ask a question, or /help")
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            print()
            return
        command, _, argument = line.partition(" ")
        try:
            if command == "/quit":
                return
            elif command == "/help":
                _note(HELP)
            elif command == "/reset":
                chat.reset()
            elif command == "/image":
                if not argument.strip():
                    raise InputError("/image: got no file, expected /image FILE")
                image = read_image(argument.strip())
                chat.reset()
            elif command.startswith("/"):
                raise InputError(f"{command}: no such command, expected /image, /reset, /help or /quit")
            elif line:
                _answer(chat, line, None if chat.turns else image, options)
        except InputError as error:  # the conversation goes on
            _note(f"error: {error}")
        except KeyboardInterrupt:
            _note("(cut short)")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
