#!/usr/bin/env python3
"""Serve a small real model with the quantized KV cache, ask it a question, and show what the cache costs.

Asks twice: plainly, and at the end of a conversation long enough that the answer is read from packed pages. Prints the
model's answers and a table of stored bits, bytes per token and token capacity against bf16. Exits with 0
only if the server answered; otherwise the end of the server's log is printed. The server is ended in every case.
"""

import argparse
import json
import shlex
import signal
import sys
import time
from pathlib import Path

import make_smollm2
from launcher import ROOT, Server, ServerError
from machine import device_flags

QUESTION = "What is the capital of France?"
CHAT = "/v1/chat/completions"

TEXT = ROOT / "test" / "data" / "prose.txt"
RESIDUAL_LENGTH, PAGE_SIZE = 128, 64

RECIPE = [
    "--enable-kvtuner-quant",
    *("--kvtuner-nbits-key", "4", "--kvtuner-nbits-value", "4", "--kvtuner-asym"),
    *("--kvtuner-axis-key", "1", "--kvtuner-axis-value", "0"),
    *("--kvtuner-q-group-size", "64", "--kvtuner-residual-length", str(RESIDUAL_LENGTH)),
]

# Without these the cache takes most of the machine's memory and allocating it most of the time.
SMALL = ["--max-total-tokens", "32768", "--max-running-requests", "8"]


def main(arguments=None):
    """Command line entry; returns the exit status."""
    options = _options(arguments)
    # A terminated demo must end its server as an interrupted one does.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (ServerError, OSError, RuntimeError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1


def _options(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="checkpoint folder (default: SmolLM2-135M-Instruct, made on first use)"
    )
    parser.add_argument("--port", type=int, help="port to serve on (default: a free one)")
    log_path = ROOT / ".cache" / "logs" / "demo.log"
    parser.add_argument("--log", type=Path, default=log_path, help="the server's log (default: %(default)s)")
    parser.add_argument("--serve", action="store_true", help="keep the server running until Ctrl-C")
    parser.add_argument("--flag-off", action="store_true", help="serve without the quantized cache")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further server flags; must come last")
    return parser.parse_args(arguments)


def _interrupt(*unused):
    raise KeyboardInterrupt


def _run(options):
    model = options.model or make_smollm2.make()
    flags = [*device_flags(), *SMALL, *([] if options.flag_off else RECIPE), *options.flags]
    options.log.parent.mkdir(parents=True, exist_ok=True)
    server = Server(model, flags, log_path=options.log, port=options.port)
    print("$", " ".join(["python", *server.command[1:]]), flush=True)
    with server:
        began = time.monotonic()
        server.wait_until_healthy(progress=_progress)
        _end_progress(f"server ready after {time.monotonic() - began:.0f} s")
        answer, _ = ask(server, QUESTION)
        print(f"\nQ: {QUESTION}\nA: {answer}\n")
        answer, tokens = ask(server, QUESTION, conversation())
        packed = max(tokens - RESIDUAL_LENGTH, 0) // PAGE_SIZE * PAGE_SIZE
        where = "" if options.flag_off else f", {packed} of them read from packed pages"
        print(f"Q: the same, behind {tokens} tokens of conversation{where}\nA: {answer}\n")
        print(cost_table(server.request("/server_info")), flush=True)
        if options.serve:
            _keep_serving(server)
    return 0


def conversation():
    """Chat messages about a text of some hundred tokens."""
    text = TEXT.read_text(encoding="utf-8")[:2500]
    return [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "Thank you. What would you like to know?"},
    ]


def ask(server, question, before=()):
    """The model's answer to a question at temperature 0, and the tokens of the prompt.

    ``before`` are chat messages that precede the question. Raises ServerError when the answer is empty.
    """
    reply = server.request(CHAT, chat_payload(question, before))
    content = (reply["choices"][0]["message"]["content"] or "").strip()
    if not content:
        raise server.error("the model's answer is empty")
    return content, reply["usage"]["prompt_tokens"]


def chat_payload(question, before=()):
    """What is sent for a question at temperature 0; ``before`` as in :func:`ask`."""
    messages = [*before, {"role": "user", "content": question}]
    return {"model": "default", "messages": messages, "temperature": 0, "max_tokens": 64}


def curl_command(url):
    """A shell command that asks the server at ``url`` the question."""
    command = ["curl", "-s", url + CHAT, "-H", "Content-Type: application/json", "-d"]
    return shlex.join([*command, json.dumps(chat_payload(QUESTION))])


def cost_table(server_info):
    """A table of what the KV cache costs, from the answer to GET /server_info."""
    cache = server_info["internal_states"][0].get("kvtuner")
    if cache is None:
        return f"The quantized cache is off: {server_info['max_total_num_tokens']:,} tokens of full-precision KV cache."
    memory = (cache["pool_bytes"] + cache["ring_bytes"]) / 2**20
    rows = [
        ("", "quantized", "bf16"),
        ("stored bits per element, keys", f"{cache['stored_bits_key']:.2f}", "16.00"),
        ("stored bits per element, values", f"{cache['stored_bits_value']:.2f}", "16.00"),
        ("stored bits per element, average", f"{cache['stored_bits']:.2f}", "16.00"),
        ("KV bytes per token", f"{cache['bytes_per_token']:,.0f}", f"{cache['bytes_per_token_full_precision']:,.0f}"),
        (
            f"tokens in {memory:,.1f} MiB",
            f"{cache['capacity_tokens']:,}",
            f"{cache['capacity_tokens_full_precision']:,}",
        ),
    ]
    return "\n".join(f"{name:<34}{quantized:>12}{full:>12}" for name, quantized, full in rows)


def _keep_serving(server):
    print(f"\nserving on {server.url} until Ctrl-C; log: {server.log_path}. Ask it from another terminal:\n")
    print(curl_command(server.url), flush=True)
    while server.alive():
        time.sleep(0.5)
    raise server.error("the server ended by itself")


def _progress(seconds):
    if sys.stdout.isatty():
        print(f"\rwaiting for the server: {seconds:.0f} s", end="", flush=True)
    elif seconds > 1 and int(seconds) % 15 == 0:
        print(f"waiting for the server: {seconds:.0f} s", flush=True)


def _end_progress(line):
    print(("\r\033[K" if sys.stdout.isatty() else "") + line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
