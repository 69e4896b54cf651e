"""README.md of a saved model: what it is, how to load it, and what was measured; nothing that is not known."""

from __future__ import annotations

from collections.abc import Mapping

from fedspine_edge.model.manifest import ModelManifest

_PIPELINES = {
    "classification": "text-classification",
    "token_classification": "token-classification",
    "causal_lm": "text-generation",
}
"""The hub's names of the tasks."""
_AUTO = {
    "classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "causal_lm": "AutoModelForCausalLM",
}


def model_card(manifest: ModelManifest, metrics: Mapping[str, float]) -> str:
    """The card as Markdown; `metrics` are measured numbers by name."""
    spec = manifest.spec
    kept = sorted({(len(h), len(c)) for h, c in zip(manifest.heads, manifest.channels)})
    group = "heads" if spec.num_heads == spec.num_kv_heads else "KV heads (each with its query heads)"
    widths = ", ".join(f"{h}/{spec.num_kv_heads} {group} and {c}/{spec.intermediate_size} channels" for h, c in kept)
    labels = f", labels: {', '.join(manifest.labels)}" if manifest.labels else ""
    adapter = "none or merged" if manifest.r is None else f"LoRA, r = {manifest.r}, scaling = {manifest.scaling:g}"
    examples = f"{manifest.trained_examples:,} examples, {manifest.trained_steps:,} steps"
    lines = [
        "---",
        f"pipeline_tag: {_PIPELINES[manifest.task]}",
        "tags: [fedspine-edge, pruned]",
        "---",
        f"# {manifest.base or spec.family}, pruned" if manifest.pruning_ratio else f"# {manifest.base or spec.family}",
        "",
        f"- base model: {manifest.base or 'unnamed'}, weights with sha256 {spec.base_sha256}",
        f"- family: {spec.family}, task: {manifest.task}{labels}",
        f"- trained on: {examples if manifest.trained_steps else 'not recorded'}",
        f"- kept per layer: {widths}",
        f"- removed: {manifest.pruning_ratio:.4f} of the prunable parameters, {manifest.sparsity:.4f} of all",
        f"- adapter: {adapter}",
        "",
        "Load it with",
        "",
        "    import fedspine_edge",
        '    model = fedspine_edge.load_model("this-folder")',
        "",
        _alone(manifest),
        "",
    ]
    if metrics:
        lines += ["| measured | value |", "|---|---|"]
        names = {"num_examples": "test tokens" if manifest.task == "causal_lm" else "test examples"}
        lines += [f"| {names.get(name, name)} | {value:.6g} |" for name, value in metrics.items()]
    else:
        lines.append("Accuracy and latency were not measured before it was saved.")
    return "\n".join(lines) + "\n"


def _alone(manifest: ModelManifest) -> str:
    if not manifest.standard:
        return "since transformers alone cannot build these widths."
    adapter = "" if manifest.r is None else ", with peft installed: without it transformers leaves the adapter out"
    return f"or with transformers' `{_AUTO[manifest.task]}.from_pretrained`{adapter}."
