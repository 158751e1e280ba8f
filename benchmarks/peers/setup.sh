#!/usr/bin/env bash
# Make the environments of the peers under .bench/peers/. Each is apart from ours, since each pins other
# versions. torch comes first and the peer without its dependencies, so that all sides run the same torch.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python3.11}
TORCH=torch==2.13.0

environment() { # NAME PEER DEPENDENCY...
    local home=.bench/peers/$1 peer=$2
    shift 2
    if [ -e "$home/.ready" ]; then
        echo "$home is there already"
        return
    fi
    "$PYTHON" -m venv "$home"
    "$home/bin/pip" install --quiet "$TORCH"
    "$home/bin/pip" install --quiet "$@"
    "$home/bin/pip" install --quiet --no-deps "$peer"
    touch "$home/.ready"
}

mkdir -p .bench/peers
environment gptqmodel gptqmodel==7.7.0 \
    transformers==5.23.0 'accelerate>=1.15' 'numpy>=2.4.6' 'safetensors>=0.8' device-smi dill logbar threadpoolctl \
    protobuf pillow requests pypcre tokenicer datasets pyarrow 'torchao>=0.18' defuser ninja jinja2 packaging
environment llmcompressor llmcompressor==0.14.0.1 \
    transformers==5.17.0 compressed-tensors==0.19.0 'accelerate>=1.15' 'numpy>=2,<2.5' 'datasets>=4.8.4' \
    loguru pyyaml tqdm pillow requests nvidia-ml-py
environment autoround auto-round==0.16.1 \
    transformers==5.23.0 'accelerate>=1.15' 'numpy>=2,<2.5' 'datasets>=4.8.4' \
    py-cpuinfo tqdm pydantic requests psutil
