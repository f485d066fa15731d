"""Each file here needs one library, and runs where that is installed (`make test-integrations`,
`make test-steering`).

test_<library>.py and test_<library>_<what>.py run in the library's own environment alone, since
their pins disagree. Named there, a file whose library is missing fails: no test is collected.
"""

import importlib.util
from pathlib import Path

LIBRARIES = ("sae_lens", "dictionary_learning", "sparsify", "diffusers", "peft")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if not collection_path.match("test_*.py"):
        return None
    needed = [name for name in LIBRARIES if collection_path.stem.startswith(f"test_{name}")]
    assert needed, f"{collection_path.name}: expected test_ and one of {', '.join(LIBRARIES)}"
    return None if importlib.util.find_spec(needed[0]) else True
