"""Model card of a saved model: description, how to load it, and measured results. Nothing unknown is stated."""

from __future__ import annotations

from collections.abc import Mapping

from fedspine_edge.model.manifest import ModelManifest

_PIPELINES = {
    "classification": "text-classification",
    "token_classification": "token-classification",
    "causal_lm": "text-generation",
}
"""The hub's names of the tasks."""
_AUTO_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "causal_lm": "AutoModelForCausalLM",
}


def model_card(manifest: ModelManifest, metrics: Mapping[str, float]) -> str:
    """Return README.md; `metrics` maps names to measured numbers."""
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
        _other_loader(manifest),
        "",
    ]
    if metrics:
        lines += ["| measured | value |", "|---|---|"]
        names = {"num_examples": "test tokens" if manifest.task == "causal_lm" else "test examples"}
        lines += [f"| {names.get(name, name)} | {value:.6g} |" for name, value in metrics.items()]
    else:
        lines.append("Accuracy and latency were not measured before the model was saved.")
    return "\n".join(lines) + "\n"


def _other_loader(manifest: ModelManifest) -> str:
    if not manifest.standard:
        return "because transformers alone cannot build layers of these widths."
    adapter = "" if manifest.r is None else " with peft installed; without peft, transformers ignores the adapter"
    return f"or with transformers' `{_AUTO_CLASSES[manifest.task]}.from_pretrained`{adapter}."
