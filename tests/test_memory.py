"""A training step's memory: beside what lasts, codes and a few buffers; nothing N×F, nothing F×D.

The peak of `Trainer.step` over what is resident without gradients (weights, moments, batches) is
allowed to be 32 MiB, 8·N·D bytes (centred tokens and the error), 32·F bytes (counts, the inverse
index) and 64 bytes a stored pair. At N=1024, D=256, F=65536 and K=16 that is 37 MiB, and 45 MiB
with AuxK and its 128 pairs a token. A float32 gradient of one weight matrix (F×D) has 64 MiB and a
float32 N×F matrix 256 MiB; an N×F mask alone has 64 MiB.
"""

import json

import numpy as np
import pytest
from common import run_child

N, D, F, K = 1024, 256, 65536, 16
MIB = 2**20

# Two threads, because the kernels' buffers are per thread. malloc keeps what is freed: it is made
# to give it back, or the step could use it unseen.
STEPS = """
import ctypes, json, sys
from pathlib import Path

import torch

from fastsae import SAE, SAEConfig, TopK
from fastsae.batches import Batch
from fastsae.data import open_source
from fastsae.train import TrainConfig, Trainer

options = json.loads(sys.argv[1])
n, d, f, k = options["shape"]


def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


torch.set_num_threads(2)
torch.manual_seed(1)
batches = [Batch(torch.randn(n, d), None) for _ in range(3)]
sae = SAE(SAEConfig(d, f, TopK(k), dead_after=10**9))
if options["auxk"]:
    # This keeps nearly all of them below the k-th value, yet leaves about 1000 positive a token.
    sae.b_enc.data[: f // 10] = -1
    sae.tokens_since_fired[: f // 10] = 10**9
config = TrainConfig(
    steps=10**9, warmup_steps=0, optimizer=options["optimizer"], clip=options["clip"]
)
trainer = Trainer(sae, open_source(batches[0].x), config)
for batch in batches[:2]:
    trainer.step(batch)
trainer.optimizer.zero_grad()
ctypes.CDLL(None).malloc_trim(0)
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
output = trainer.step(batches[2])
peak = memory("VmHWM") - before
losses = {name: float(loss.detach()) for name, loss in output.losses.items()}
print(json.dumps({"peak": peak, "losses": losses, "dead": int(output.metrics["n_dead"])}))
"""


def step(optimizer: str = "adam", auxk: bool = False, clip: float | None = None) -> dict:
    options = {"shape": (N, D, F, K), "optimizer": optimizer, "auxk": auxk, "clip": clip}
    return json.loads(run_child(STEPS, json.dumps(options)).splitlines()[-1])


def allowed(pairs: int) -> int:
    return 32 * MIB + 8 * N * D + 32 * F + 64 * pairs


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("auxk", [False, True], ids=["", "auxk"])
def test_step(auxk, clip):
    measured = step(auxk=auxk, clip=clip)
    assert set(measured["losses"]) == ({"mse", "auxk"} if auxk else {"mse"})
    assert (measured["dead"] > 0.09 * F) == auxk
    limit = allowed(N * (K + auxk * D // 2))
    assert limit < 4 * F * D < N * F * 4
    assert 0 < measured["peak"] <= limit


def test_gradient_matrices_would_be_seen():
    """torch's own Adam needs them: the same measurement shows both."""
    assert step("torch-adam")["peak"] >= 2 * 4 * F * D


WANT_OF_MEMORY = """
import resource, sys
import torch
from fastsae import cpu

torch.set_num_threads(2)
n, f = 200_000, 256
x, W = torch.rand(n, 1), -torch.rand(f, 1)
every, one = (torch.full((f,), k, dtype=torch.int32) for k in (n, 1))
cpu.encode_columns(x[:100], W, None, one, f)  # the threads are there
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (int(sys.argv[1]) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, -1))
try:
    cpu.encode_columns(x, W, None, every, n * f)
except MemoryError:
    print("MemoryError")
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
x, W = torch.randn(200, 32), torch.randn(300, 32)
again = [cpu.encode_batch(x, W, None, 50, forced={"threads": t})[0] for t in (1, 2)]
print(torch.equal(*again))
"""


@pytest.mark.parametrize("mebibytes", [450, 540])
def test_want_of_memory_in_a_kernel_is_an_exception(mebibytes):
    """Wherever a thread is when it gets none, the process lives, and the next call is right."""
    assert run_child(WANT_OF_MEMORY, str(mebibytes)).split() == ["MemoryError", "True"]


LONG = """
import json, sys
from pathlib import Path

import torch

from fastsae import SAE, SAEConfig, TopK
from fastsae.data import open_source
from fastsae.train import TrainConfig, Trainer


def resident(step, _):
    if step in (2000, 10000):
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes.append(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")))


torch.set_num_threads(1)
sizes = []
config = TrainConfig(
    steps=10000, batch_size=16, log_every=100, eval_every=500, checkpoint_every=2000, ema=0.9
)
source = open_source(sys.argv[1])
sae = SAE(SAEConfig(8, 32, TopK(2), dead_after=1000))
Trainer(sae, source, config, out=sys.argv[2], holdout=source).run(progress=False, on_step=resident)
print(json.dumps(sizes))
"""


def test_ten_thousand_steps_take_no_more_memory_than_two_thousand(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((200, 8), np.float32))
    child = run_child(LONG, str(tmp_path / "x.npy"), str(tmp_path / "run"))
    first, last = json.loads(child.splitlines()[-1])
    assert last - first < 2048  # KiB, in 8000 steps
