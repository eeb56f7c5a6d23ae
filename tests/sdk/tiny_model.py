"""Writes a llama model with random weights, small enough for a test, that never wants to stop talking.

Run as a program it serves such a model with llama.cpp's own server until it is told to end:
`python tiny_model.py MODEL.gguf` writes the file if need be and prints `serving on URL`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import gguf
import numpy as np

WIDTH, LAYERS, HEADS, INNER, CONTEXT = 128, 4, 4, 256, 32768
SYLLABLES = ("ka", "nal", "ri", "vo", "lu", "me", "sta", "ten", "qui", "dor", "es", "wim", "pra", "bo", "nge", "ly")
SPECIAL = ("<unk>", "<s>", "</s>")
SLOTS, SLOT_CONTEXT = 2, 8192
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def write_model(path: Path) -> None:
    """A llama GGUF with random weights (about 4 MB), the same bytes each time."""
    random = np.random.default_rng(17)
    words = [f"▁{a}{b}{c}" for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES[:4]]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    plain = len(tokens) - len(words)  # what is no word

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * plain + [-float(index) for index in range(len(words))])
    unknown, control, byte, normal = (
        gguf.TokenType.UNKNOWN,
        gguf.TokenType.CONTROL,
        gguf.TokenType.BYTE,
        gguf.TokenType.NORMAL,
    )
    writer.add_token_types([unknown, control, control] + [byte] * 256 + [normal] * len(words))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32))

    def add_ones(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))

    add("token_embd", len(tokens), WIDTH)
    for layer in range(LAYERS):
        add_ones(f"blk.{layer}.attn_norm")
        add_ones(f"blk.{layer}.ffn_norm")
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}", WIDTH, WIDTH)
        add(f"blk.{layer}.ffn_gate", INNER, WIDTH)
        add(f"blk.{layer}.ffn_up", INNER, WIDTH)
        add(f"blk.{layer}.ffn_down", WIDTH, INNER)
    add_ones("output_norm")
    head = random.standard_normal((len(tokens), WIDTH)).astype(np.float32)
    head[:plain] = 0  # neither the end of the text nor a lone byte is ever the likeliest: it talks to its limit
    writer.add_tensor("output.weight", head)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(path: Path) -> None:
    """Serve the model on a port of the kernel's choice, one thread, with metrics, until SIGTERM."""
    import xllamacpp

    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before it starts threads
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_parallel = SLOTS
    params.n_ctx = SLOTS * SLOT_CONTEXT
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    # Each connection holds a thread of its HTTP server, an idle one for 5 s; without a free one its metrics are silent.
    params.n_threads_http = 32
    params.endpoint_metrics = True
    params.endpoint_slots = True
    params.warmup = False
    server = xllamacpp.Server(params)
    # In one write and in brackets: threads of the server write their log to the same pipe, in parts of lines.
    os.write(1, f"serving on <{server.listening_address}>\n".encode())
    signal.sigwait(signals)


if __name__ == "__main__":
    model = Path(sys.argv[1])
    if not model.exists():
        write_model(model)
    serve(model)
