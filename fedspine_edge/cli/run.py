"""Command `fedspine-edge run`."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedspine_edge.cli.options import add_backend_option, add_json_option

if TYPE_CHECKING:
    from fedspine_edge.runtime.session import Session

Result = TypeVar("Result")

EXAMPLE = "fedspine-edge run bundle/ 'what a lovely board'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="bundle folder or .zip file written by `compile`")
    parser.add_argument(
        "texts",
        nargs="*",
        metavar="TEXT",
        help="text to classify, to label word by word (words are separated by spaces) or to continue "
        "(default: lines of standard input; a blank line gives a blank answer)",
    )
    parser.add_argument(
        "--text", action="append", default=[], help="another text; --text=-3 for one that begins with a dash"
    )
    add_backend_option(parser)
    parser.add_argument(
        "--adapter", type=Path, help="adapter folder to use; needs a bundle compiled with --lora inputs"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer of a decoder in tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0: the most likely token")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k most likely tokens; 0: from all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the most likely tokens up to this probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for sampling")
    parser.add_argument("--stop", action="append", default=[], help="end the text before this string; repeatable")
    parser.add_argument(
        "--threads", type=int, help="number of threads for ONNX Runtime (default: one per core that may be used)"
    )
    parser.add_argument("--rebuild", action="store_true", help="rebuild an engine that does not fit this machine")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.errors import ConfigError
    from fedspine_edge.runtime.session import Session

    # Input that is not UTF-8 is reported as such, and output that the terminal cannot encode is escaped.
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    texts = [*arguments.texts, *arguments.text] or [line.rstrip("\n") for line in sys.stdin]
    if not any(text.strip() for text in texts):
        raise ConfigError("no text was given.", remedy="Give texts after the bundle, or lines on standard input.")
    with Session.load(
        arguments.bundle, backend=arguments.backend, threads=arguments.threads, rebuild=arguments.rebuild
    ) as session:
        if arguments.adapter is not None:
            session.set_adapter(arguments.adapter)
        if not arguments.json:
            print(f"run: {session.backend}: {session.why}", file=sys.stderr)
        if session.manifest.task == "causal_lm":
            return _generate(session, texts, arguments)
        if session.manifest.task == "token_classification":
            return _label_words(session, texts, arguments)
        return _classify(session, texts, arguments)


def _classify(session: Session, texts: list[str], arguments: argparse.Namespace) -> int:
    results = _with_gaps(texts, session.classify([text for text in texts if text.strip()]))
    if arguments.json:
        _print_json(session, [result and result.to_dict() for result in results])
        return 0
    for result in results:
        print(f"{result.label}\t{result.probability:.3f}" if result else "")
    return 0


def _label_words(session: Session, texts: list[str], arguments: argparse.Namespace) -> int:
    results = _with_gaps(texts, session.label_words([text.split() for text in texts if text.strip()]))
    if arguments.json:
        _print_json(session, [words and [result.to_dict() for result in words] for words in results])
        return 0
    for number, words in enumerate(results):
        if number:
            print()
        for result in words or ():
            print(f"{result.word}\t{result.label}\t{result.probability:.3f}")
    return 0


def _generate(session: Session, texts: list[str], arguments: argparse.Namespace) -> int:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")
    settings = {name: getattr(arguments, name) for name in names}
    if arguments.json:
        answers = (session.generate(text, **settings).to_dict() if text.strip() else None for text in texts)
        _print_json(session, list(answers))
        return 0
    for text in texts:
        for piece in session.stream(text, **settings) if text.strip() else ():
            print(piece, end="", flush=True)
        print()
    return 0


def _with_gaps(texts: list[str], results: list[Result]) -> list[Result | None]:
    """Return one result per text, None for blank texts, so that line n of the output belongs to line n of the input."""
    remaining = iter(results)
    return [next(remaining) if text.strip() else None for text in texts]


def _print_json(session: Session, results: list[Any]) -> None:
    from fedspine_edge.cli.main import print_json

    print_json({"backend": session.backend, "why": session.why, "results": results})
