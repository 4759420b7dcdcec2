"""A plan as a table for people: what the network is, every number with its rule, what it costs.

Called by `fledge plan`. Pure text in, text out.
"""

from __future__ import annotations

from typing import Any

from fledge.plan.planner import Plan
from fledge.progress import format_count, format_seconds


def plan_text(name: str, plan: Plan) -> str:
    """The whole table."""
    return "\n".join([*_head(name, plan), "", *_costs(plan), "", *_numbers(plan), ""])


def _head(name: str, plan: Plan) -> list[str]:
    model, known = plan.model, plan.estimates
    tied = "head tied to the embedding" if model.tie_word_embeddings else "separate head"
    return [
        f"{name} on {plan.hardware.name}",
        f"  {format_count(known['parameters'])} parameters: {model.num_hidden_layers} layers of "
        f"width {model.hidden_size}, {model.num_attention_heads} heads of {model.head_dim}, "
        f"feed-forward {model.intermediate_size}",
        f"  {model.vocab_size:,} tokens of vocabulary ({tied}), context "
        f"{model.max_position_embeddings:,}",
        f"  {format_count(known['tokens'])} tokens in all, "
        f"{known['flops_per_token'] / 1e6:,.1f} MFLOPs per trained token",
    ]


def _costs(plan: Plan) -> list[str]:
    known = plan.estimates
    priced = known["dollars"] is not None
    lines = [f"  {'stage':<10} {'tokens':>9} {'FLOPs':>9} {'time':>14}"]
    lines[0] += f" {'dollars':>9}" if priced else ""
    for name, stage in known["stages"].items():
        tokens = format_count(stage["tokens"]) if stage["tokens"] else "-"
        line = f"  {name:<10} {tokens:>9} {stage['flops']:>9.2g}"
        line += f" {format_seconds(stage['seconds']):>14}"
        lines.append(line + (f" {stage['dollars']:>9.2f}" if priced else ""))
    total = f"  {'together':<10} {format_count(known['tokens']):>9} {known['flops']:>9.2g}"
    total += f" {format_seconds(known['seconds']):>14}"
    lines.append(total + (f" {known['dollars']:>9.2f}" if priced else ""))
    lines += [
        f"  memory while training about {known['memory_bytes'] / 1e9:.1f} GB per device, "
        f"disk about {known['disk_bytes'] / 1e9:.1f} GB",
        f"  {known['basis']}",
    ]
    if priced:
        lines.append("  dollars at the table's price per hour (plan/hardware.py), without storage")
    return lines


def _numbers(plan: Plan) -> list[str]:
    lines = []
    section = ""
    for key, value in plan.values.items():
        name, _, short = key.partition(".")
        if name != section:
            section = name
            lines.append(f"  [{section}]")
        lines.append(f"    {short:<22} {_show(value):<17} {plan.rules[key]}")
    return lines


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1e4 else f"{value:,.0f}"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return " ".join(f"{k}={v:g}" for k, v in value.items())
    return str(value)
