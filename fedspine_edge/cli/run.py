"""`fedspine-edge run`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedspine_edge.runtime.session import Session

EXAMPLE = "fedspine-edge run bundle/ 'what a lovely board'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder written by `compile`")
    parser.add_argument(
        "texts",
        nargs="*",
        metavar="TEXT",
        help="to classify, to label word by word (words are split at blanks) or to continue; "
        "default: lines of standard input",
    )
    parser.add_argument(
        "--text", action="append", default=[], help="one more text; one that begins with a dash: --text=-3"
    )
    parser.add_argument(
        "--backend", choices=["auto", "onnxruntime", "tensorrt", "tensorrt_rtx"], default="auto", help="default: auto"
    )
    parser.add_argument("--adapter", type=Path, help="folder of another adapter; needs a bundle with --lora inputs")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer of a decoder; default 128")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest; default 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest up to this; default 1")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default 0")
    parser.add_argument("--stop", action="append", default=[], help="end the text before this string, may repeat")
    parser.add_argument("--rebuild", action="store_true", help="build the engine anew where it does not fit")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.errors import ConfigError
    from fedspine_edge.runtime.session import Session

    texts = [*arguments.texts, *arguments.text] or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise ConfigError("no text was given.", remedy="Give texts after the bundle, or lines on standard input.")
    with Session.load(arguments.bundle, backend=arguments.backend, rebuild=arguments.rebuild) as session:
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
    results = session.classify(texts)
    if arguments.json:
        _print_json(session, [result.to_dict() for result in results])
        return 0
    for result in results:
        print(f"{result.label}\t{result.probability:.3f}")
    return 0


def _label_words(session: Session, texts: list[str], arguments: argparse.Namespace) -> int:
    results = session.label_words([text.split() for text in texts])
    if arguments.json:
        _print_json(session, [[result.to_dict() for result in words] for words in results])
        return 0
    for number, words in enumerate(results):
        if number:
            print()
        for result in words:
            print(f"{result.word}\t{result.label}\t{result.probability:.3f}")
    return 0


def _generate(session: Session, texts: list[str], arguments: argparse.Namespace) -> int:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")
    settings = {name: getattr(arguments, name) for name in names}
    if arguments.json:
        _print_json(session, [session.generate(text, **settings).to_dict() for text in texts])
        return 0
    for text in texts:
        for piece in session.stream(text, **settings):
            print(piece, end="", flush=True)
        print()
    return 0


def _print_json(session: Session, results: list[Any]) -> None:
    from fedspine_edge.cli.main import print_json

    print_json({"backend": session.backend, "why": session.why, "results": results})
