"""The Triton decode step against the torch one on the same cache, token by token, and against whole sequences."""

from dataclasses import dataclass, fields, replace

import pytest
import torch
from kernel_cases import Case, make_case, plan_options
from tolerances import SCORE_ABSOLUTE, assert_close

import dla_kernels as dk
from dla_kernels import launch, step_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS = 4
ROUTING_DIM = 6


@dataclass(frozen=True)
class Setting:
    """One decode: a backbone, a policy and every option of a step."""

    backbone: str = "gated_deltanet"
    policy: str = "dla"
    drift: str = "token"
    rule: str = "density"
    closed: str = "transition"
    content: bool = False
    head_tau: bool = False
    key_heads: int = 1
    tokens: int = 26
    value_dim: int = 4
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        changed = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return "-".join(f"{getattr(self, f.name)}".removeprefix("torch.") for f in changed) or "default"

    @property
    def slots(self) -> int:
        return {"single": 1, "log_linear": 6}.get(self.policy, SLOTS)

    @property
    def case(self) -> Case:
        case = make_case(
            self.backbone, tokens=self.tokens, key_heads=self.key_heads, value_dim=self.value_dim, dtype=torch.float32
        )
        half = {name: getattr(case, name).to(self.dtype) for name in ("q", "k", "v")}
        return replace(case, **half).map(lambda x: x.to(DEVICE))

    def options(self) -> dict:
        tau = 0.9 if self.drift == "token" else 0.2
        return {
            "tau": torch.tensor([tau, 0.8 * tau], device=DEVICE) if self.head_tau else tau,
            "policy": self.policy,
            "drift": self.drift,
            "capacity_rule": self.rule,
            "interval": 3,
            "closed_slots": self.closed,
        }

    def empty(self) -> dk.MergeCache:
        case = self.case
        return dk.MergeCache.empty(
            2, 2, self.slots, case.k.shape[-1], self.value_dim, routing_dim=ROUTING_DIM, device=DEVICE
        )

    def inputs(self) -> list[tuple[Case, dict]]:
        """Arguments of every token: q, k, v, gates; read weights and content reading."""
        case, generator = self.case, torch.Generator().manual_seed(7)
        weights = torch.rand(2, self.tokens, 2, self.slots, generator=generator).to(DEVICE)
        heads = (1, 2) if self.closed == "transition" else (2, 1)  # routing may be grouped, or per head
        rho, kappa = (
            torch.randn(2, self.tokens, n, ROUTING_DIM, generator=generator).to(DEVICE, self.dtype) for n in heads
        )
        steps = []
        for t in range(self.tokens):
            given = {"read_weights": weights[:, t]}
            if self.content:
                given |= {"rho": rho[:, t], "kappa": kappa[:, t]}
                given |= {"gain": torch.tensor([1.5, 0.7], device=DEVICE)}
                given |= {"sharpness": torch.tensor([1.0, 2.0], device=DEVICE)}
            steps.append((case.map(lambda x, t=t: x[:, t]), given))
        return steps


COVERING = [  # every backbone x policy, drift, capacity rule, closed x content, tau, group, type and tile edge
    Setting("mamba2", "single", closed="frozen", content=True),
    Setting("mamba2", "log_linear", content=True, tokens=31),
    Setting("mamba2", "fixed", closed="frozen", content=True),
    Setting("mamba2", "dla", "token", "density", "transition", content=True, head_tau=True),
    Setting("mamba2", "dla", "update", "random", "frozen"),
    Setting("gated_deltanet", "single"),
    Setting("gated_deltanet", "log_linear", closed="frozen", tokens=31),
    Setting("gated_deltanet", "fixed", key_heads=2),
    Setting("gated_deltanet", "dla", "token", "density", "frozen", content=True, value_dim=20),
    Setting("gated_deltanet", "dla", "update", "oldest", "transition", head_tau=True, key_heads=2),
    Setting("gated_deltanet", "dla", "token", "mass", "transition", content=True),
    Setting("gated_deltanet", "dla", "update", "density", "transition", content=True, dtype=torch.float16),
]


def step(setting: Setting, inputs: tuple[Case, dict], cache: dk.MergeCache, backend: str) -> torch.Tensor:
    case, given = inputs
    return dk.dla_step(*case.all, cache=cache, backend=backend, **given, **setting.options())


def tensors(cache: dk.MergeCache) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(cache).items() if value is not None}


def assert_same_cache(actual: dk.MergeCache, expected: dk.MergeCache) -> None:
    for name in ("fill", "position", "counts", "gates"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    for name in ("states", "key_sums"):
        assert_close(name, getattr(actual, name), getattr(expected, name))
    largest = actual.counts.max()
    assert (actual.scores - expected.scores).abs().max() < SCORE_ABSOLUTE * largest, "scores"


@pytest.mark.parametrize("setting", COVERING, ids=str)
def test_every_token_equals_the_torch_step_on_sequences_of_different_fill(setting):
    actual, expected = setting.empty(), setting.empty()
    opened = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    for t, inputs in enumerate(setting.inputs()):
        if t == 5:  # the second sequence starts anew
            for cache in (actual, expected):
                for name, tensor in tensors(cache).items():
                    tensor[1].fill_(1 if name == "gates" else 0)
        o = step(setting, inputs, actual, "triton")
        assert_close("o", o.float(), step(setting, inputs, expected, "torch").float(), torch.float32)
        assert_same_cache(actual, expected)
        opened += expected.counts.gather(-1, expected.fill[..., None] - 1)[..., 0] == 1
    if setting.policy in ("fixed", "dla"):
        assert (opened > SLOTS).all(), "every head merged"


@pytest.mark.parametrize(("backbone", "policy"), [("gated_deltanet", "dla"), ("mamba2", "log_linear")])
def test_decoding_equals_the_whole_sequence(backbone, policy):
    setting = Setting(backbone, policy, content=True)
    whole, steps = setting.case, setting.inputs()
    options = plan_options(policy) | {"tau": setting.options()["tau"], "capacity": setting.slots}
    plan = dk.plan_memory(*whole.keys, **options, backend="torch")
    given = {name: torch.stack([given[name] for _, given in steps], 1) for name in ("read_weights", "rho", "kappa")}
    affinity = dk.slot_affinity(given["rho"], given["kappa"], plan, backend="torch")
    routing = {name: steps[0][1][name] for name in ("gain", "sharpness")}
    read = dk.content_read_weights(given["read_weights"], affinity, **routing)
    expected, after = dk.dla_attention(
        *whole.all,
        read_weights=read,
        plan=plan,
        routing_keys=given["kappa"],
        return_cache=True,
        backend="torch",
    )
    cache = setting.empty()
    o = torch.stack([step(setting, inputs, cache, "triton") for inputs in steps], 1)
    assert_close("o", o, expected)
    assert_same_cache(cache, after)


def guarded(tensor: torch.Tensor, guard: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(a copy of `tensor` in the middle of a larger buffer, the buffer)."""
    buffer = torch.full((tensor.numel() + 64,), guard, device=tensor.device).to(tensor.dtype)
    inside = buffer[32:-32].view(tensor.shape)
    inside.copy_(tensor)
    return inside, buffer


class PoisonedTorch:
    """torch, but new memory is NaN or far out of range: what a kernel reads before it was written shows."""

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def empty(self, *size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(size, float("nan") if dtype.is_floating_point else 10**6, dtype=dtype, device=device)


def test_a_step_writes_in_place_and_nothing_beside_the_live_slots(monkeypatch):
    monkeypatch.setattr(step_triton, "torch", PoisonedTorch())
    setting = Setting(content=True, value_dim=20, tokens=12, closed="frozen")
    cache, expected = setting.empty(), setting.empty()
    guards = {}
    for name, tensor in tensors(cache).items():
        inside, guards[name] = guarded(tensor, 77.0)
        setattr(cache, name, inside)
    pointers = {name: tensor.data_ptr() for name, tensor in tensors(cache).items()}
    for case, given in setting.inputs():
        wide = torch.full((2, 200), float("nan"), device=DEVICE)
        places = zip((case.q, case.k, case.v), (3, 40, 90), strict=True)
        views = [wide[:, at : at + x[0].numel()].view_as(x).copy_(x) for x, at in places]
        o = step(setting, (Case(*views, case.log_decay, case.beta), given), cache, "triton")
        assert_close("o", o, step(setting, (case, given), expected, "torch"))
        dead = torch.arange(setting.slots, device=DEVICE) >= cache.fill[..., None]
        for name in ("states", "key_sums", "counts", "scores"):
            assert (getattr(cache, name)[dead] == 0).all(), name
        assert (cache.gates == 1).all()
    assert_same_cache(cache, expected)
    assert pointers == {name: tensor.data_ptr() for name, tensor in tensors(cache).items()}
    for name, buffer in guards.items():
        assert (buffer[:32] == 77).all() and (buffer[-32:] == 77).all(), name


def test_tiles_of_values_decide_alike_to_the_last_bit():
    setting = Setting(value_dim=40, tokens=9)
    caches = [setting.empty(), setting.empty()]
    for inputs in setting.inputs():
        one = step(setting, inputs, caches[0], "triton")
        with launch.override_tuning(step_update={"BV": 64, "num_warps": 4, "num_stages": 1}):
            assert torch.equal(step(setting, inputs, caches[1], "triton"), one)
    assert all(torch.equal(a, b) for a, b in zip(*(tensors(c).values() for c in caches), strict=True))


@pytest.mark.parametrize(
    ("scores", "counts", "merged"),
    [
        ([0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1], [2, 1, 1, 1]),
        ([1.0, 2.0, 2.0, 0.5], [1, 2, 2, 1], [1, 2, 3, 1]),
        ([0.1, 0.4, 0.9, 0.9], [1, 1, 1, 1], [2, 1, 1, 1]),
        ([0.5, 0.5, 0.5 - 1e-13, 0.6], [1, 1, 1, 1], [1, 2, 1, 1]),
    ],
    ids=["equal", "newest pair", "oldest pair", "beyond float32"],
)
def test_a_full_memory_merges_its_least_dense_pair_and_the_oldest_of_equals(scores, counts, merged):
    setting = Setting("mamba2", tokens=1)
    cache = setting.empty()
    cache.states.copy_(torch.randn(cache.states.shape, generator=torch.Generator().manual_seed(1)))
    cache.scores.copy_(torch.tensor(scores, dtype=torch.float64))
    cache.counts.copy_(torch.tensor(counts))
    cache.gates.copy_(torch.tensor([0.9, 0.8, 0.7, 0.6]))
    cache.fill.fill_(SLOTS)
    cache.position.fill_(sum(counts))
    expected, before = cache.clone(), cache.states.clone()
    inputs = setting.inputs()[0]
    options = setting.options() | {"tau": -1.0}
    for backend, changed in (("triton", cache), ("torch", expected)):
        dk.dla_step(*inputs[0].all, cache=changed, backend=backend, **inputs[1], **options)
    assert cache.counts[0, 0].tolist() == merged
    assert_same_cache(cache, expected)
    pair = next(i for i, (a, b) in enumerate(zip(counts, merged, strict=True)) if a != b)
    decay = inputs[0].log_decay.exp()[..., None, None]
    assert_close("merged state", cache.states[:, :, pair], decay * (before[:, :, pair] + before[:, :, pair + 1]))


def test_a_full_log_linear_cache_goes_on_by_joining_its_two_oldest_slots():
    setting = Setting("mamba2", "log_linear", tokens=26)
    case, steps = setting.case, setting.inputs()
    small = replace(setting.empty(), key_sums=None)
    for name in ("states", "counts", "scores", "gates"):
        setattr(small, name, getattr(small, name)[:, :, :3].contiguous())
    options = setting.options()
    for t, (now, given) in enumerate(steps):
        weights = given["read_weights"][..., :3]
        if t == 4:
            with pytest.raises(ValueError, match="it is full"):
                dk.dla_step(*now.all, read_weights=weights, cache=small.clone(), backend="torch", **options)
        dk.dla_step(*now.all, read_weights=weights, cache=small, backend="triton", **options)
        assert (small.counts.sum(-1) == t + 1).all() and (small.fill <= 3).all()
        assert (small.counts.gather(-1, small.fill[..., None] - 1) == 1).all()
    one = dk.MergeCache.empty(2, 2, 1, 5, 4, device=DEVICE)
    for t in range(26):
        now = case.map(lambda x, t=t: x[:, t])
        dk.dla_step(*now.all, read_weights=weights[..., :1], cache=one, tau=0.6, policy="single", backend="torch")
    assert_close("sum of states", small.states.sum(2), one.states[:, :, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "dlaa"}, "policy='dlaa'"),
        ({"drift": "tokens"}, "drift='tokens'"),
        ({"capacity_rule": "newest"}, "capacity_rule='newest'"),
        ({"closed_slots": "froze"}, "closed_slots='froze'"),
        ({"backend": "tritn"}, "backend='tritn'"),
        ({"rho": torch.zeros(2, 1, ROUTING_DIM)}, "all of rho, kappa, gain and sharpness"),
        ({"read_weights": torch.ones(2, 2, SLOTS + 1)}, "read_weights"),
        ({"tau": torch.ones(3)}, "tau"),
    ],
)
def test_a_wrong_option_is_named_and_changes_nothing(change, message):
    setting = Setting(tokens=1)
    case, given = setting.inputs()[0]
    cache = setting.empty()
    with pytest.raises(ValueError, match=message):
        dk.dla_step(*case.all, cache=cache, **({"backend": "triton"} | given | setting.options() | change))
    assert all((x == (1 if name == "gates" else 0)).all() for name, x in tensors(cache).items())


def test_a_cache_that_cannot_be_written_in_place_is_refused():
    setting = Setting(tokens=1)
    cache = setting.empty()
    cache.states = cache.states.transpose(0, 1)
    with pytest.raises(ValueError, match=r"cache\.states is not contiguous"):
        step(setting, setting.inputs()[0], cache, "triton")
    with pytest.raises(launch.BackendError, match="float64"):
        step(setting, setting.inputs()[0], replace(cache, states=cache.states.double()), "triton")


@pytest.mark.parametrize("setting", COVERING[:4], ids=str)
def test_a_step_is_two_launches_and_looks_at_no_value(setting):
    """Meta tensors have none: what runs is fixed by shapes, as a CUDA graph needs."""
    cache = replace(setting.empty(), **{name: x.to("meta") for name, x in tensors(setting.empty()).items()})
    case, given = setting.inputs()[0]
    options = setting.options()
    if isinstance(options["tau"], torch.Tensor):
        options["tau"] = options["tau"].to("meta")
    with launch.recording(90) as launches:
        dk.dla_step(
            *case.map(lambda x: x.to("meta")).all,
            cache=cache,
            backend="triton",
            **{name: x.to("meta") for name, x in given.items()},
            **options,
        )
    assert [x.kernel.__name__ for x in launches] == ["step_decide_kernel", "step_update_kernel"]
