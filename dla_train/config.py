"""Every setting of a run, as dataclasses, and the rules between them.

Owns the schema that Hydra fills; the rules between the settings are in config_rules.py. Nothing here imports torch: a
512-GPU configuration is checked on a laptop in milliseconds. Values are plain types; a docstring under each field
gives its unit and meaning. Choices are strings checked against `CHOICES`, so that an error can name the nearest one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

MISTAKE = 2
"""Exit code of every program after a mistake in the configuration, the data or the run directory."""


class ConfigError(ValueError):
    """A user mistake in the configuration: names the key, the value, the rule and the mend."""


@dataclass
class ModelConfig:
    """Shape of the language model. Dimension letters as in the project's legend (B, T, D, H, K, V)."""

    name: str = MISSING
    """Label of this shape, e.g. `gated_deltanet_125m`; appears in run names and reports."""
    backbone: str = MISSING
    """Token mixer: `mamba2`, `gated_deltanet` or `attention` (the softmax baseline)."""
    vocab_size: int = MISSING
    """Rows of the embedding; at least the tokenizer's size."""
    width: int = MISSING
    """D, the model width."""
    num_layers: int = MISSING
    """Number of residual blocks (mixer + MLP)."""
    num_heads: int = MISSING
    """H: value heads of a recurrent mixer, query heads of attention."""
    num_key_heads: int = MISSING
    """Hk: key/query heads of gated_deltanet, B/C groups of mamba2, key/value heads of attention. Divides num_heads."""
    key_dim: int = MISSING
    """K per head: key size (mamba2: state size N; attention: head size)."""
    value_dim: int = MISSING
    """V per head: value size (mamba2: head size P; attention: must equal key_dim)."""
    mlp_width: int = MISSING
    """Inner width of the SwiGLU MLP; 0 leaves the MLP out."""
    conv_width: int = 4
    """Taps of the short causal convolution before a recurrent mixer; 0 leaves it out. 0 for attention."""
    conv_bias: bool = False
    """Add a learned bias to the convolution's sums before SiLU, as in Mamba-2's published checkpoints."""
    qk_norm_eps: float = 0.0
    """Added to |q|^2 and |k|^2 in gated_deltanet's normalisation; published implementations have 1e-6. 0 is exact."""
    rope_base: float = 500000.0
    """Base of the rotary embedding of attention; recurrent mixers have no position code."""
    tie_embeddings: bool = False
    """Share the embedding and the output head."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of the normal initialisation of matrices (see models/init.py for the whole table)."""


@dataclass
class MemoryConfig:
    """The memory policy of a recurrent mixer: which states exist, which merge, how each is read (docs/dla.md)."""

    policy: str = MISSING
    """`single`, `log_linear`, `fixed`, `dla`, or `none` (softmax attention)."""
    capacity: int = 30
    """K: most slots a head keeps. `single` has 1; it bounds the context of `log_linear` at 2**(capacity - 1) tokens."""
    tau: float = 0.6
    """Drift threshold of a boundary, in [0.1, 1.3]; the initial value where tau is learned or controlled."""
    tau_control: str = "fixed"
    """`fixed`; `learned` (a bounded parameter per head); `rate` (per head, moved by the sign of the rate's error)."""
    target_boundary_rate: float = 0.1
    """Boundaries per token that `tau_control: rate` aims at, in (0, 1)."""
    tau_step: float = 0.01
    """How far `tau_control: rate` moves tau after an optimizer step."""
    drift: str = "token"
    """What a token is scored on: `token` (its own write) or `update` (the state after its write)."""
    capacity_rule: str = "mass"
    """Which adjacent pair merges when the cache is full: the one of least score in all (`mass`), of least score a token
    (`density`, the paper's), the `oldest`, or a `random` one."""
    interval_tokens: int = 64
    """Tokens between boundaries of the `fixed` policy."""
    levels: int = 15
    """Read weights per head of `log_linear`; deeper levels use the last one. 15 covers 16K tokens."""
    closed_slots: str = "transition"
    """Whether closed slots keep decaying (`transition`) or keep the state of their end (`frozen`)."""
    read: str = "content"
    """Read weights: `unit` (1), `slot` (per recency rank or level), `content` (slot plus routing on slot keys),
    `content_only` (1 plus routing)."""
    routing: str = "convolved"
    """What content routing compares: projections of its own, with a short convolution where q and k have one
    (`convolved`) or without (`projected`), or q and k themselves (`qk`)."""
    routing_dim: int = 16
    """R: size of a head's own projections."""
    gain_init: float = 0.0
    """Initial content gain per head; 0 starts as the slot form, exactly."""
    sharpness_init: float = 8.0
    """Initial sharpness (inverse temperature) of content routing per head."""
    gate: str = "soft"
    """Training gate of boundaries: `soft`, `hard` or `straight_through`. Inference is always hard."""
    gate_temperature: float = 0.1
    """Temperature of the gate at the first step, in units of drift."""
    gate_temperature_final: float = 0.1
    """Temperature at the last step; linear in between."""
    chunk_tokens: int = 0
    """C: tokens per chunk of the chunkwise form; 0 picks the backend's default."""
    backend: str = "auto"
    """Operations: `auto` (triton on CUDA, torch elsewhere), `triton`, `torch` or `recurrent`."""

    @property
    def weighs_slots(self) -> bool:
        """Whether a weight per recency rank or level is learned."""
        return self.read in ("slot", "content")

    @property
    def read_outputs(self) -> int:
        """Read weights that are learned per head, by level or recency rank."""
        if not self.weighs_slots:
            return 0
        return self.levels if self.policy == "log_linear" else self.capacity

    @property
    def routes(self) -> bool:
        """Whether slots are read by content."""
        return self.read in ("content", "content_only")

    @property
    def gated(self) -> bool:
        """Whether boundaries carry a gate in training: decided by drift, between several slots."""
        return self.policy == "dla" and self.gate != "hard" and self.capacity > 1

    @property
    def softly_gated(self) -> bool:
        """Whether training reads boundaries otherwise than inference; `straight_through` differs backward alone."""
        return self.gated and self.gate == "soft"


@dataclass
class PhaseConfig:
    """A stretch of the run with its own blend and row length (docs/data.md)."""

    start_tokens: int = MISSING
    """Tokens of the run before this phase, rounded up to a whole step; 0 in the first."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of rows of each source of data.train, by name, of any sum; one that is absent or 0 gives none. With one
    source, may be left out."""
    context_tokens: int | None = None
    """Tokens in a row of this phase, a divisor of data.context_tokens; None is data.context_tokens."""


@dataclass
class DataConfig:
    """Token files and how rows are cut from them."""

    name: str = MISSING
    """Label of the corpus."""
    train: list[Any] = MISSING
    """Prefixes of Megatron `.bin/.idx` pairs to train on, or sources `{name, prefixes, weight}` to blend."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """Blends that follow one another; empty is one phase of the sources' weights. Past phases cannot be changed."""
    packing: str = "concatenate"
    """`concatenate` cuts the stream of documents into rows; `best_fit` keeps documents whole and pads."""
    validation: list[str] = field(default_factory=list)
    """Prefixes of held-out pairs; empty turns validation off."""
    tokenizer: str = MISSING
    """sentencepiece `.model` file or a Hugging Face tokenizer folder; must match the files' manifest."""
    context_tokens: int = MISSING
    """T: tokens in a row; with phases, in a row of the longest."""
    allow_changed: bool = False
    """Resume although files or past phases are not those of the checkpoint; the change is logged and recorded."""
    loader_workers: int = 0
    """Threads that read ahead; any number gives the same batches."""


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = MISSING
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay, for matrices only (see optim.py for the groups)."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    schedule: str = "cosine"
    """`cosine`, `wsd` (warm up, hold, decay) or `constant`, each after a linear warm-up."""
    warmup_steps: int = 0
    """Steps of the linear warm-up."""
    decay_steps: int = 0
    """Steps of the final decay of `wsd`."""
    final_lr_ratio: float = 0.1
    """Learning rate at the last step, as a share of the peak."""
    z_loss: float = 0.0
    """Weight of the square of the log-partition of the head (PaLM); 0 turns it off."""


@dataclass
class TrainConfig:
    """The loop."""

    steps: int = MISSING
    """Optimizer steps of the whole run; the schedules end here."""
    initial: str | None = None
    """Model folder (of dla-export or dla-import) whose weights the run begins with, at step 0; None initialises."""
    stop_at_step: int | None = None
    """Stop early after this step, with a checkpoint; the schedules still end at `steps`."""
    global_batch_rows: int = MISSING
    """Rows (of context_tokens) in one optimizer step, over all ranks."""
    micro_batch_rows: int = MISSING
    """Rows one rank takes through the model at once; the rest is gradient accumulation."""
    segment_tokens: int = 0
    """Rows go through the model in segments of so many tokens, each going on with the memory the one before left, and
    gradients end where one begins; 0 takes whole rows."""
    dtype: str = "float32"
    """Compute type of matrix products: `float32` or `bfloat16`; parameters, states and decisions stay float32."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    recompute: bool = False
    """Recompute each block in backward instead of keeping its activations; memory plans are kept, never re-decided."""
    validation_interval_steps: int = 0
    """Steps between validations; 0 validates at the end only."""
    validation_batches: int = 0
    """Global batches of one validation; 0 turns validation off. It logs the loss with hard boundaries, by position in
    the document too, and where training has soft boundaries the loss with those."""
    validation_band_edges_tokens: list[int] = field(default_factory=list)
    """Positions at which a validation's bands meet, rising; empty is 1/16, 1/4 and 1/2 of data.context_tokens."""

    @property
    def last_step(self) -> int:
        """The step at which a start ends."""
        return self.stop_at_step or self.steps


@dataclass
class EvaluationConfig:
    """Published tasks during training (docs/evaluation.md); the other keys say how `tasks` are asked."""

    tasks: list[str] = field(default_factory=list)
    """Tasks of dla_train/harness/catalogue.yaml, by lm_eval's names; empty turns evaluation off."""
    interval_steps: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    data_dir: str | None = None
    """Local copies of the tasks' documents, which `dla-evaluate fetch` writes; training opens no connection."""
    limit: int = 0
    """First documents of every task; 0 takes all, and 500 prompts of a needle task."""
    num_fewshot: int = 0
    """Solved examples in front of every question."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of a needle task's prompt with the 128 of its answer; the task is asked at each."""
    max_length: int | None = None
    """Most tokens of a prompt with its answer, longer ones lose their beginning; None is data.context_tokens. Needle
    tasks have their own lengths."""
    bos: bool | None = None
    """Whether prompts begin with BOS; None does as in training, by the training files' manifest."""
    batch_tokens: int = 16384
    """Tokens, padding included, that a rank scores at once."""
    decode_rows: int = 16
    """Answers that a rank generates at once; each holds a memory of its own."""


@dataclass
class ParallelConfig:
    """How a run spreads over ranks. Data parallel is world size / (tensor x context)."""

    tensor: int = 1
    """Ranks that share one copy of the model by heads."""
    sequence: bool = False
    """Divide the residual stream between layers along time over the tensor ranks."""
    context: int = 1
    """Ranks that share each row along time."""
    backend: str = "auto"
    """Process group: `auto` (nccl on CUDA, gloo elsewhere), `gloo` or `nccl`."""
    timeout_minutes: float = 10.0
    """Longest wait in a collective."""


@dataclass
class EngineConfig:
    """Who owns backward and step."""

    name: str = MISSING
    """`local` (plain PyTorch) or `deepspeed`."""
    zero_stage: int = 0
    """ZeRO stage of deepspeed, 0 to 3; the local engine has 0 only."""
    weights: str = "float32"
    """What parameters are stored in: `float32`, or `bfloat16` beside the optimizer's float32 values (ZeRO 1 to 3)."""
    offload_optimizer: bool = False
    """Keep the optimizer's values and moments in the host's memory and update them there (ZeRO 1 to 3)."""


@dataclass
class CheckpointConfig:
    """When to save, what to keep, whether to resume."""

    interval_steps: int = 0
    """Steps between checkpoints; 0 saves at the end (and at stop_at_step) only."""
    keep_last: int = 2
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every_steps: int = 0
    """Also keep the checkpoints of every so many steps for good; 0 keeps none but the newest."""
    asynchronous: bool = True
    """Train on while a checkpoint is written, from a copy on the host (12 bytes a parameter over all ranks)."""
    resume: str = "auto"
    """`auto` continues the run found in run_dir, `never` refuses one, `required` fails if there is none."""


@dataclass
class ResilienceConfig:
    """What a run does when numbers go wrong or a phase hangs (docs/reliability.md)."""

    max_skipped_steps: int = 3
    """Steps in a row with a gradient that is not finite that are left out; one more makes the run go back."""
    spike_deviations: float = 0.0
    """A loss this many median deviations above the running median is a spike; 0 looks for none."""
    spike_window_steps: int = 200
    """Losses in the running median."""
    spike_patience_steps: int = 5
    """Spikes in a row after which the run goes back."""
    max_rewinds: int = 3
    """Returns to the last good checkpoint, past the data that led there, in the whole run; one more ends it."""
    setup_minutes: float = 60.0
    """Longest time before the first step; 0 is no limit, as for the others."""
    first_step_minutes: float = 60.0
    """Of the first step of a start, which compiles."""
    step_minutes: float = 8.0
    """Of any other step; below parallel.timeout_minutes, so that stacks are written before other ranks give up."""
    validation_minutes: float = 120.0
    """Of a validation."""
    evaluation_minutes: float = 120.0
    """Of one task of an evaluation."""
    checkpoint_minutes: float = 60.0
    """Of a save, as far as training waits for it."""


@dataclass
class LoggingConfig:
    """Where the numbers go; metrics.jsonl is always written."""

    interval_steps: int = 10
    """Steps between log lines."""
    memory_interval_steps: int = 100
    """Steps between closer looks into the memories: numbers by layer to every tracker, by head to memory.jsonl
    (docs/diagnostics.md); 0 never looks."""
    progress: bool = True
    """Progress bar with ETA on standard error."""
    tensorboard: bool = False
    """Also write TensorBoard event files."""
    wandb: bool = False
    """Also log to Weights & Biases; falls back to offline, and says so."""
    wandb_project: str = "dla-train"
    """Project name there."""
    wandb_group: str = ""
    """Group of runs there; a sweep gives its name. "" is none."""
    wandb_init_timeout_seconds: float = 30.0
    """How long to try online before going offline."""
    peak_tflops: float = 0.0
    """Peak of one device in TFLOP/s, for MFU; 0 looks the device up and leaves MFU out if it is unknown."""


@dataclass
class Config:
    """A whole run."""

    name: str = MISSING
    """Name of the run."""
    run_dir: str = MISSING
    """Folder of this run's config, metrics and checkpoints; one run per folder."""
    seed: int = 0
    """Seed of initialisation and data order."""
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


CHOICES: dict[str, tuple[str, ...]] = {
    "model.backbone": ("mamba2", "gated_deltanet", "attention"),
    "memory.policy": ("single", "log_linear", "fixed", "dla", "none"),
    "memory.tau_control": ("fixed", "learned", "rate"),
    "memory.drift": ("token", "update"),
    "memory.capacity_rule": ("density", "mass", "oldest", "random"),
    "memory.closed_slots": ("transition", "frozen"),
    "memory.read": ("unit", "slot", "content", "content_only"),
    "memory.routing": ("qk", "projected", "convolved"),
    "memory.gate": ("soft", "hard", "straight_through"),
    "memory.backend": ("auto", "triton", "torch", "recurrent"),
    "data.packing": ("concatenate", "best_fit"),
    "optim.schedule": ("cosine", "wsd", "constant"),
    "train.dtype": ("float32", "bfloat16"),
    "train.device": ("auto", "cpu", "cuda"),
    "parallel.backend": ("auto", "gloo", "nccl"),
    "engine.name": ("local", "deepspeed"),
    "engine.weights": ("float32", "bfloat16"),
    "checkpoint.resume": ("auto", "never", "required"),
}
"""Legal strings of every key that is a choice."""

TAU_RANGE = (0.1, 1.3)
"""Of memory.tau, and of a learned one: above sqrt(2) hardly any token drifts far enough, below 0.1 nearly every one."""
