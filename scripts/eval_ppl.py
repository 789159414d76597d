"""Perplexity and KL of a model on WikiText-2 or a text file: `wq.evaluate` as a script."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from wq import evaluate, report
from wq.cli import evaluation_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="repo id, folder or GGUF file; dense or quantized")
    parser.add_argument("--base", help="the dense model to compare with")
    parser.add_argument("--text", action="append", help="wikitext, builtin, code, or a local text file; repeatable")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--windows", type=int, help="only the first so many")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    options = vars(arguments).copy()
    as_json = options.pop("json")
    options["text"] = options["text"] or "wikitext"
    result = evaluate(options.pop("model"), **options)
    if as_json:
        print(json.dumps(result))
    else:
        for one in report.texts_of(result):
            Console().print(evaluation_table(one))


if __name__ == "__main__":
    main()
