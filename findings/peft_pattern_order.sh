#!/usr/bin/env bash
# peft 0.21.2: an adapter that is saved and loaded can compute something else, since the order of its patterns decides.
#
# alpha_pattern and rank_pattern give some modules their own alpha and rank. Where two patterns match a module, the one
# that comes first in the dictionary counts. save_pretrained writes adapter_config.json with sorted keys, so another one
# may come first when the adapter is loaded.
#
# Expected: the loaded adapter has the scales, and the logits, of the one that was saved; or the patterns' order does not
# matter. Seen: with {"q_proj": 8, "layers.1.self_attn.q_proj": 32} the second layer's scale is 4 when the adapter is made
# and 16 after save_pretrained and from_pretrained, without a warning. The logits differ.
#
# The script exits with 0 as long as the versions below behave so. It needs Python 3.11 or newer and a package index.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check \
    peft==0.21.2 torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0
"$python" --version
"$python" -m pip list --disable-pip-version-check 2>/dev/null | grep -E '^(peft|torch|transformers) '

cat > "$folder/order.py" <<'EOF'
import sys

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))


def show(name, model):
    scales = [layer.self_attn.q_proj.scaling["default"] for layer in model.base_model.model.model.layers]
    print(name, scales)
    with torch.no_grad():
        return model.eval()(torch.arange(10)[None]).logits


pattern = {"q_proj": 8, "layers.1.self_attn.q_proj": 32}
config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], alpha_pattern=pattern, task_type="CAUSAL_LM")
made = peft.get_peft_model(base(), config)
with torch.no_grad():
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            weight.normal_()
before = show("made  ", made)
made.save_pretrained(sys.argv[1])
after = show("loaded", peft.PeftModel.from_pretrained(base(), sys.argv[1]))
print("equal logits", bool(torch.allclose(before, after, atol=1e-3)))
EOF

check() {
    if ! grep -qxF "$2" "$folder/output"; then
        echo "CHANGED: $1 no longer holds" >&2
        exit 1
    fi
    echo "holds: $1"
}

"$python" "$folder/order.py" "$folder/adapter" 2> "$folder/errors" | tee "$folder/output" || cat "$folder/errors" >&2
check "the first pattern that matches counts when the adapter is made" "made   [4.0, 4.0]"
check "another pattern comes first in the file" "loaded [4.0, 16.0]"
check "the loaded adapter computes something else" "equal logits False"
