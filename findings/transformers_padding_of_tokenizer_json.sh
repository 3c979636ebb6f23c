#!/usr/bin/env bash
# transformers 5.23.0: a padding section in tokenizer.json adds a token whose id the model does not have.
#
# A tokenizer.json may say how batches are padded: enable_padding() of the tokenizers library writes that, by default
# with the text [PAD] and the id 0, and pads with that id. PreTrainedTokenizerFast takes the text as its pad_token, not
# the id. If the vocabulary has no such text, it adds one, with the id after all others. Padded batches then hold an id
# beyond the model's embedding, and len(tokenizer) is one more than the vocabulary.
#
# Expected: the id that the file names, or no pad_token. Seen: [PAD] with id 4, in a vocabulary of 4.
#
# The script exits with 0 as long as the versions below behave so. It needs Python 3.11 or newer and a package index.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3
"$python" --version
"$python" -m pip list --disable-pip-version-check 2>/dev/null | grep -E '^(tokenizers|transformers) '

cat > "$folder/pad.py" <<'EOF'
import sys

import tokenizers
from transformers import PreTrainedTokenizerFast

path = sys.argv[1]
vocabulary = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3}
tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
tokenizer.enable_padding()
tokenizer.save(path)

texts = ["a", "a b"]
raw = tokenizers.Tokenizer.from_file(path)
print("tokenizers  ", raw.get_vocab_size(), [encoding.ids for encoding in raw.encode_batch(texts)])
fast = PreTrainedTokenizerFast(tokenizer_file=path)
print("transformers", len(fast), fast(texts, padding=True)["input_ids"], fast.pad_token, fast.pad_token_id)
EOF

check() {
    if ! grep -qxF "$2" "$folder/output"; then
        echo "CHANGED: $1 no longer holds" >&2
        exit 1
    fi
    echo "holds: $1"
}

"$python" "$folder/pad.py" "$folder/tokenizer.json" 2> "$folder/errors" | tee "$folder/output" || cat "$folder/errors" >&2
check "tokenizers pads with the id of the file" "tokenizers   4 [[2, 0], [2, 3]]"
check "transformers adds a fifth token and pads with it" "transformers 5 [[2, 4], [2, 3]] [PAD] 4"
