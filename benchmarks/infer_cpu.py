"""The engine on a CPU beside transformers with the same weights: decode, prefill, int8, bpb.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/infer_cpu.py --shape d4
    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/infer_cpu.py --shape d12 --batches 1
    .venv/bin/python benchmarks/infer_cpu.py --bpb CHECKPOINT --text FILE.txt

Each call measures one shape and adds what it found to benchmarks/infer_cpu.json; the table of all
of it goes to benchmarks/infer_cpu.md. Run it alone on the machine. The measuring itself is
`fledge.bench.infer`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python")]

from fledge.bench import infer  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
TABLE = Path(__file__).with_suffix(".md")
DECODED_ROWS = 64  # that --bpb decodes together


def decoded_nats(engine: Any, rows: list[list[int]]) -> float:
    """Nats of every token but the first of each row, all of them read by decode steps."""
    import torch

    from fledge.model.kv_cache import Piece

    runner, nats = engine.runner, 0.0
    for first in range(0, len(rows), DECODED_ROWS):
        group = rows[first : first + DECODED_ROWS]
        runner.cache = engine.model.new_cache(len(group), engine.context)
        for at in range(max(map(len, group)) - 1):
            going = [i for i, row in enumerate(group) if at + 1 < len(row)]
            pieces = [Piece(i, at, 1) for i in going]
            with torch.inference_mode():
                table = runner.decode([group[i][at] for i in going], pieces).log_softmax(dim=-1)
                wanted = torch.tensor([group[i][at + 1] for i in going])
                nats -= float(table.gather(1, wanted[:, None]).double().sum())
    return nats


def bits_per_byte(checkpoint: str, text_file: str, max_bytes: int) -> dict[str, Any]:
    """Bits per byte of a real text under the weights of each format, by `Engine.score` and by
    decode steps that are given the text token by token."""
    from fledge.engine import Engine
    from fledge.model import Transformer
    from fledge.tokenizer import Tokenizer

    model, tokenizer = Transformer.load(checkpoint), Tokenizer.load(checkpoint)
    model.eval()
    raw = Path(text_file).read_bytes()[:max_bytes].decode("utf-8", "ignore")
    ids, width = tokenizer.encode(raw), model.config.max_position_embeddings - 1
    rows = [[tokenizer.bos_id, *ids[i : i + width - 1]] for i in range(0, len(ids), width - 1)]
    found: dict[str, Any] = {
        "bytes": len(raw.encode()),
        "tokens": len(ids),
        "layers": model.config.num_hidden_layers,
        "hidden": model.config.hidden_size,
    }
    for weights in ("float32", "bfloat16", "int8"):
        engine = Engine(model, tokenizer, weights=weights)
        nats = -sum(sum(row) for row in engine.score(rows))
        found[weights] = nats / math.log(2) / found["bytes"]
        nats = decoded_nats(engine, rows)
        found[f"{weights} decoded"] = nats / math.log(2) / found["bytes"]
        engine.close()
    return found


def table(stored: dict[str, Any]) -> str:
    """The results file as it is published."""
    lines = [
        "# The engine on a CPU",
        "",
        f"`benchmarks/infer_cpu.py`, {stored['threads']} threads, {stored['cpu']}, torch"
        f" {stored['torch']}, {stored['peer']}, {stored['date']}. Random weights in nanochat's"
        " shapes, 512 prompt tokens,",
        "temperature 1, the best 50. Milliseconds a decode step: the better of two runs' medians."
        " Ours and the peer's runs alternate in one process.",
        f"Bound: bytes a step must read (weights once, keys and values of every row) over the"
        f" measured copy bandwidth, at best {stored['bandwidth'] / 1e9:.1f} GB/s.",
        *([stored["note"]] if stored.get("note") else []),
        "",
        "| shape | batch | prompts | weights | ms a step | tok/s | peer ms | times faster | bound"
        " ms | share of the bound |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for e in stored["entries"]:
        step, peer = e["step_seconds"], e.get("peer_step_seconds")
        bound = e["bound_seconds"] * e["bandwidth"] / stored["bandwidth"]
        theirs = f"{peer * 1e3:.2f} | {peer / step:.2f}" if peer else " | "
        lines.append(
            f"| {e['shape']} | {e['batch']} | {'one' if e['shared_prompt'] else 'own'}"
            f" | {e['weights']} | {step * 1e3:.2f} | {e['batch'] / step:,.0f} | {theirs}"
            f" | {bound * 1e3:.2f} | {100 * bound / step:.0f} % |"
        )
    lines += [
        "",
        "Time to the first token of the last row (ms); prompts are read in chunks of 512 tokens:",
        "",
        "| shape | batch | prompts | weights | ours | peer | times faster |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for e in stored["entries"]:
        peer = e.get("peer_first_seconds")
        theirs = f"{peer * 1e3:.0f} | {peer / e['first_seconds']:.2f}" if peer else " | "
        lines.append(
            f"| {e['shape']} | {e['batch']} | {'one' if e['shared_prompt'] else 'own'}"
            f" | {e['weights']} | {e['first_seconds'] * 1e3:.0f} | {theirs} |"
        )
    if "bpb" in stored:
        b = stored["bpb"]
        lines += [
            "",
            f"Bits per byte of {b['bytes']:,} bytes of held-out text under a trained model"
            f" ({b['layers']} layers, width {b['hidden']}), against float32:",
            "",
            "| weights | scored in one pass | read by decode steps |",
            "| --- | --- | --- |",
        ]
        for weights in ("float32", "bfloat16", "int8"):
            cells = [
                f"{b[name]:.4f} ({100 * (b[name] / b['float32'] - 1):+.2f} %)"
                for name in (weights, f"{weights} decoded")
            ]
            lines.append(f"| {weights} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    """The processor in the kernel's words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {k.strip(): v.strip() for k, v in facts.items()}
    return f"{facts.get('model name', platform.machine())} family {facts.get('cpu family', '?')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(infer.SHAPES))
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--formats", default="float32,bfloat16,int8")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--bpb", help="a checkpoint folder")
    parser.add_argument("--text", help="held-out text for --bpb")
    parser.add_argument("--max-bytes", type=int, default=300_000)
    parser.add_argument("--note", help="what else is to be known of the machine; goes to the table")
    args = parser.parse_args()

    import torch
    import transformers

    stored: dict[str, Any] = (
        json.loads(RESULTS.read_text()) if RESULTS.exists() else {"entries": []}
    )
    if args.shape:
        batches = tuple(int(b) for b in args.batches.split(","))
        found = infer.measure(
            args.shape,
            batches=batches,
            formats=tuple(args.formats.split(",")),
            steps=args.steps,
            peer=True,
        )
        key = lambda e: (  # noqa: E731
            e["shape"] != "d4",
            e["batch"],
            e["shared_prompt"],
            ["float32", "bfloat16", "int8"].index(e["weights"]),
        )
        new = {key(e) for e in found}
        entries = [e for e in stored["entries"] if key(e) not in new] + found
        for entry in entries:
            entry.pop("steps", None)
            entry.pop("peer_steps", None)
        stored |= {
            "entries": sorted(entries, key=key),
            "threads": torch.get_num_threads(),
            "cpu": cpu_name(),
            "torch": torch.__version__,
            "peer": f"transformers {transformers.__version__}",
            "date": date.today().isoformat(),
            "bandwidth": max(e["bandwidth"] for e in entries),
        }
    if args.bpb:
        stored["bpb"] = bits_per_byte(args.bpb, args.text, args.max_bytes)
    if args.note:
        stored["note"] = args.note
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    TABLE.write_text(table(stored))
    print(table(stored))


if __name__ == "__main__":
    main()
