#!/usr/bin/env bash
# Installs fedspine_edge on a Jetson with JetPack 6 or 7, and keeps the torch and TensorRT of the board.
#
#   jetson/install.sh             into .venv of this folder
#   jetson/install.sh --dry-run   prints the steps without running them; works on any machine
#   jetson/install.sh --service   into /opt/fedspine-edge, with the systemd unit of the device agent
#   jetson/install.sh --no-apt    installs no system packages
#
# Exit codes: 0 installed and usable; 1 installed, but doctor found a problem; 2 not installed, with the remedy.
# For tests: FEDSPINE_TEGRA_RELEASE and FEDSPINE_BOARD_MODEL are the files with the L4T release and the board model.
set -euo pipefail
cd "$(dirname "$0")/.."

RELEASE_FILE="${FEDSPINE_TEGRA_RELEASE:-/etc/nv_tegra_release}"
MODEL_FILE="${FEDSPINE_BOARD_MODEL:-/proc/device-tree/model}"
PREFIX=/opt/fedspine-edge
CONFIG_DIR=/etc/fedspine-edge
SERVICE_USER=fedspine
export PIP_DISABLE_PIP_VERSION_CHECK=1

dry_run=false service=false apt=true venv="$PWD/.venv"

log() { echo "install: $*"; }
fail() { # $1: problem; $2: remedy
  echo "install: error: $1" >&2
  echo "install:   $2" >&2
  exit 2
}
run() { # prints a step as a shell command and, unless this is a dry run, runs it
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  $dry_run || "$@"
}
as_root() {
  if [ "$(id -u)" = 0 ]; then run "$@"; else run sudo "$@"; fi
}

while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry_run=true ;;
    --service) service=true venv="$PREFIX/venv" ;;
    --no-apt) apt=false ;;
    -h | --help)
      sed -n '2,10s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    *) fail "unknown option $1." "See: jetson/install.sh --help" ;;
  esac
  shift
done

# ---- the board -------------------------------------------------------------------------------------------------
if [ -r "$RELEASE_FILE" ]; then
  release="$(cat "$RELEASE_FILE")"
elif $dry_run; then
  log "$RELEASE_FILE does not exist, so this is not a Jetson; showing the steps for an Orin with L4T 36.5"
  release='# R36 (release), REVISION: 5.0'
else
  fail "$RELEASE_FILE does not exist, so this is not a Jetson." \
    "On other machines use scripts/bootstrap, or add --dry-run to see the steps."
fi
[[ $release =~ R([0-9]+)\ *\(release\),\ *REVISION:\ *([0-9]+) ]] ||
  fail "$RELEASE_FILE contains no L4T release." "Expected: # R36 (release), REVISION: 4.3, ..."
l4t="${BASH_REMATCH[1]}" l4t_minor="${BASH_REMATCH[2]}"
board=unknown
if [ -r "$MODEL_FILE" ]; then board="$(tr -d '\0' <"$MODEL_FILE")"; fi

case "$l4t" in
  36) jetpack=6 python=python3.10 torch_index=https://pypi.jetson-ai-lab.io/jp6/cu126 ;;
  38 | 39) jetpack=7 python=python3.12 torch_index=https://pypi.jetson-ai-lab.io/sbsa/cu130 ;;
  *)
    if [ "$l4t" -lt 36 ]; then
      fail "L4T $l4t.$l4t_minor (JetPack 5 or older) has a Python older than 3.10, which fedspine_edge needs." \
        "Orin: flash JetPack 6 or 7. TX2 and Xavier have neither; they can only be simulated."
    fi
    fail "L4T $l4t.$l4t_minor is not supported by this script." "Supported: 36 (JetPack 6), 38 and 39 (JetPack 7)."
    ;;
esac
# JetPack 7.2 (L4T 39) supports both chips; before it, the release determines the chip.
case "$board" in
  *Thor*) sm=110 ;;
  *Orin*) sm=87 ;;
  *) if [ "$l4t" = 36 ]; then sm=87; else sm=110; fi ;;
esac
log "L4T $l4t.$l4t_minor, JetPack $jetpack, board: $board, $python, sm_$sm"

# ---- system packages: installed, never upgraded --------------------------------------------------------------------
packages=("$python-venv" "$python-dev" g++ git)
cuda_bin=/usr/local/cuda/bin
if $dry_run || [ ! -x "$cuda_bin/nvcc" ] || ! "$python" -c 'import tensorrt' 2>/dev/null; then
  packages+=(nvidia-jetpack) # CUDA toolkit and TensorRT with its Python package
fi
wanted=()
for package in "${packages[@]}"; do
  if $dry_run || ! dpkg -s "$package" >/dev/null 2>&1; then wanted+=("$package"); fi
done
if [ ${#wanted[@]} -gt 0 ]; then
  if $apt; then
    as_root apt-get update
    as_root apt-get install --yes --no-upgrade "${wanted[@]}"
  else
    log "skipped because of --no-apt: sudo apt-get install --no-upgrade ${wanted[*]}"
  fi
fi

# ---- the environment, with access to the board's packages -----------------------------------------------------------
if $service; then as_root install -d -o "$(id -un)" "$PREFIX"; fi
if $dry_run || [ ! -x "$venv/bin/python" ]; then
  run "$python" -m venv --system-site-packages "$venv"
elif ! grep -q 'include-system-site-packages = true' "$venv/pyvenv.cfg"; then
  fail "$venv cannot access the board's packages." "Remove it and run this script again: rm -r $venv"
fi

# ---- torch: that of the board, never that of the index ------------------------------------------------------------------
launch_kernel='import torch; assert float(torch.ones(8, device="cuda").sum()) == 8.0'
torch_remedy="Install NVIDIA's wheel for JetPack $jetpack and run this script again:
install:     $venv/bin/pip install --index-url $torch_index torch
install:   or one of https://docs.nvidia.com/deeplearning/frameworks/install-pytorch-jetson-platform/"
run "$venv/bin/python" -c "$launch_kernel" ||
  fail "no installed torch runs a CUDA kernel (the index's aarch64 wheel is built for servers)." "$torch_remedy"

# The following installations must not change these versions.
constraints="$venv/board-constraints.txt"
write_constraints='import importlib.metadata as m, sys
for name in ("torch", "tensorrt"):
    try:
        print(f"{name}=={m.version(name)}")
    except m.PackageNotFoundError:
        print(f"note: no metadata of {name}", file=sys.stderr)'
if $dry_run; then
  log "would write the versions of the board's torch and TensorRT to $constraints"
else
  "$venv/bin/python" -c "$write_constraints" >"$constraints"
  log "keeping: $(tr '\n' ' ' <"$constraints")"
fi

# torch is removed from the requirements, not only constrained: NVIDIA's pre-releases such as 2.5.0a0 do not satisfy
# torch>=2.5 although they work, and pip would refuse or replace them.
read -r -d '' list_requirements <<'PYTHON' || true
import re
from pip._vendor import tomli
project = tomli.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
wanted = [*project["dependencies"], *extras["device"], *extras["broker"], *extras["run"], *extras["export"], *extras["data"]]
print("\n".join(r for r in wanted if re.split(r"[^A-Za-z0-9_.-]", r)[0] not in ("torch", "fedspine-edge")))
PYTHON
requirements="$venv/board-requirements.txt"
if $dry_run; then
  log "would write the requirements of pyproject.toml except torch to $requirements"
else
  "$venv/bin/python" -c "$list_requirements" >"$requirements"
fi
run "$venv/bin/python" -m pip install --constraint "$constraints" --requirement "$requirements"

# NVIDIA's wheels for JetPack 6 are built against numpy 1 and do not work with numpy 2.
if $dry_run; then
  log "would install numpy<2 if this torch does not work with the installed numpy"
elif ! "$venv/bin/python" -c 'import torch; torch.ones(1).numpy()' 2>/dev/null; then
  run "$venv/bin/python" -m pip install --constraint "$constraints" 'numpy>=1.26,<2'
fi

# New releases of transformers may need a newer torch, and can then be imported only without models.
has_models='import transformers, transformers.generation.utils; assert transformers.is_torch_available()'
old_torch='transformers>=5.15,<5.16'
if $dry_run; then
  log "would install $old_torch if the newest release does not work with this torch"
elif ! "$venv/bin/python" -c "$has_models" 2>/dev/null; then
  run "$venv/bin/python" -m pip install --constraint "$constraints" "$old_torch"
fi

# ---- fedspine_edge with its kernels for this SM -------------------------------------------------------------------
run env PATH="$cuda_bin:$PATH" "$venv/bin/python" -m pip install --force-reinstall --no-deps \
  --config-settings=cmake.define.FEDSPINE_CUDA=ON \
  --config-settings="cmake.define.FEDSPINE_CUDA_ARCHITECTURES=$sm" .
run "$venv/bin/python" -c "$launch_kernel" || fail "torch no longer runs a CUDA kernel." "$torch_remedy"

# ---- the service --------------------------------------------------------------------------------------------------
if $service; then
  if $dry_run || ! id "$SERVICE_USER" >/dev/null 2>&1; then
    as_root useradd --system --no-create-home --shell /usr/sbin/nologin "$SERVICE_USER"
  fi
  as_root install -d -m 0750 -g "$SERVICE_USER" "$CONFIG_DIR"
  if $dry_run || ! as_root test -e "$CONFIG_DIR/device.toml"; then
    as_root install -m 0640 -g "$SERVICE_USER" examples/device.toml "$CONFIG_DIR/device.toml"
  fi
  as_root install -m 0644 jetson/fedspine-edge-device.service /etc/systemd/system/
  as_root systemctl daemon-reload
  log "next: edit $CONFIG_DIR/device.toml, then: sudo systemctl enable --now fedspine-edge-device"
fi

# From another folder, so that doctor checks the installed package and not the source tree.
cd /
run "$venv/bin/fedspine-edge" doctor --role device
