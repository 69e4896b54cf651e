"""Command `fedspine-edge inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedspine_edge.cli.options import add_json_option

EXAMPLE = "fedspine-edge inspect model.bundle/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="bundle folder or .zip file written by `compile`")
    add_json_option(parser, "print bundle.json")


def run(arguments: argparse.Namespace) -> int:
    from fedspine_edge.bundle.archive import bundle_folder
    from fedspine_edge.bundle.bundle import PLAN, TIMING_CACHE, damage_of, load_bundle, read_manifest
    from fedspine_edge.cli.main import print_json

    with bundle_folder(arguments.bundle) as folder:
        if arguments.json:
            print_json(read_manifest(folder).to_dict())
            return 0
        bundle = load_bundle(folder, ignore=(PLAN, TIMING_CACHE))  # files that can be rebuilt do not hide the rest
        manifest, engine = bundle.manifest, bundle.manifest.engine
        damaged = [
            f"{name} {problem}"
            for name in (PLAN, TIMING_CACHE)
            if (entry := manifest.files.get(name)) and (problem := damage_of(folder / name, entry))
        ]
    health = "; ".join(damaged) or "all hashes correct"
    profiles = engine.profiles if engine else tuple(filter(None, [manifest.default_profile]))
    checks = (manifest.verification, manifest.cache_verification, engine.verification if engine else None)
    rows = {
        "model": f"{manifest.family}, {manifest.task}, {manifest.precision}, opset {manifest.opset}",
        "parameters": f"{manifest.num_parameters:,} ({manifest.sparsity:.1%} removed)",
        "widths": ", ".join(f"{width.heads}x{width.channels}" for width in manifest.widths) + " (heads x channels)",
        "inputs": ", ".join(t.name for t in manifest.inputs if t.kind == "tokens"),
        "kv cache": f"{sum(t.kind == 'past' for t in manifest.inputs)} tensors"
        if manifest.task == "causal_lm"
        else "-",
        "quantised": manifest.quantization.summary if manifest.quantization else "-",
        "adapter": f"input, rank up to {manifest.adapter.max_rank}" if manifest.adapter else "merged or none",
        "labels": ", ".join(manifest.labels) or "-",
        "limit": f"{manifest.max_tokens} tokens",
        "profiles": "; ".join(profile.summary for profile in profiles) or "-",
        "engine": f"{engine.backend} {engine.version} for SM {', '.join(engine.compute_capabilities)}"
        if engine
        else f"none: {manifest.engine_absent}",
        "size": f"{bundle.size_bytes / 1e6:.1f} MB in {len(manifest.files)} files, {health}",
    }
    for name, value in rows.items():
        print(f"{name:>10}  {value}")
    for check in checks:
        if check is not None:
            print(f"{'compared':>10}  {check.subject} with {check.reference}: {check.summary}")
    if manifest.accuracy is not None:
        print(f"{'measured':>10}  {manifest.accuracy.summary}")
    return 0
