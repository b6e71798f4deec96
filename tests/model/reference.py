"""The model family once more, to check the package against: numpy float64, from the papers and the released layout.

Nothing here comes from the package, and no torch computes. Each function states one equation for one sequence, in
loops where loops are clearer. A test may replace a function or a constant to see that a mistake would be noticed.

Letters: T tokens, d hidden, H heads, G key-value heads, D head width, N and P its parts without and with position,
R latent, V value width, E experts, K chosen experts.
"""

import json
from collections.abc import Callable
from math import ceil, floor, log, pi
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = dict[str, Array]
Config = dict[str, Any]
Module = Callable[[Array, Array, Array], Array]
BLOCK = 128  # rows and columns of an FP8 block
LOST = -np.inf  # what the experts of the losing groups count for


# The checkpoint: 8 bytes of header length, a JSON header, the raw tensors.


def read_checkpoint(folder: Path) -> tuple[Config, Weights]:
    """(config.json, every tensor of model.safetensors as float64, FP8 blocks multiplied out)."""
    raw = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors: Weights = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            a, b = entry["data_offsets"]
            tensors[name] = DECODERS[entry["dtype"]](raw[start + a : start + b]).reshape(entry["shape"])
    for name in [n for n in tensors if n.endswith("_scale_inv")]:
        weight = name.removesuffix("_scale_inv")
        tensors[weight] = multiply_blocks(tensors[weight], tensors.pop(name))
    return json.loads((folder / "config.json").read_text()), tensors


def float32(raw: bytes) -> Array:
    return np.frombuffer(raw, "<f4").astype(np.float64)


def bfloat16(raw: bytes) -> Array:
    """The upper half of a float32."""
    return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def e4m3(raw: bytes) -> Array:
    return np.array([e4m3_value(byte) for byte in range(256)])[np.frombuffer(raw, np.uint8)]


def e4m3_value(byte: int) -> float:
    """1 sign, 4 exponent (bias 7) and 3 mantissa bits; no infinities, and only S.1111.111 is not a number."""
    sign, exponent, mantissa = -1.0 if byte >> 7 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


DECODERS = {"F32": float32, "BF16": bfloat16, "F8_E4M3": e4m3}


def multiply_blocks(weight: Array, scale_inv: Array) -> Array:
    """Block [i, j] times scale_inv[i, j]; the last row and column of blocks may be narrower (V3 Sec 3.3.2)."""
    whole = weight.copy()
    for i, j in np.ndindex(*scale_inv.shape):
        whole[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] *= scale_inv[i, j]
    return whole


def under(prefix: str, weights: Weights) -> Weights:
    """The weights of one module, by their names inside it."""
    return {n.removeprefix(prefix + "."): t for n, t in weights.items() if n.startswith(prefix + ".")}


# Parts.


def linear(w: Weights, name: str, x: Array) -> Array:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def feed_forward(w: Weights, x: Array) -> Array:
    """SwiGLU."""
    gate = linear(w, "gate_proj", x)
    return linear(w, "down_proj", gate * sigmoid(gate) * linear(w, "up_proj", x))


# Rotary positions.


def frequencies(config: Config, dim: int) -> Array:
    """Radians per position for each of the dim / 2 pairs, stretched as the config says."""
    theta = config["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
    scaling = config.get("rope_scaling")
    if not scaling:
        return theta
    return {"yarn": yarn, "llama3": llama3}[scaling["type"]](theta, scaling, config["rope_theta"])


def yarn(theta: Array, scaling: Config, base: float) -> Array:
    """NTK by parts (YaRN Sec 3.2), its ramp over the index of the pair, as in the released code."""
    dim = 2 * len(theta)

    def turning(times: float) -> float:
        """The index whose pair turns this often within the original context."""
        return dim * log(scaling["original_max_position_embeddings"] / (times * 2 * pi)) / (2 * log(base))

    low = max(floor(turning(scaling.get("beta_fast", 32))), 0)
    high = min(ceil(turning(scaling.get("beta_slow", 1))), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return theta / scaling["factor"] * ramp + theta * (1 - ramp)


def llama3(theta: Array, scaling: Config, base: float) -> Array:
    """Llama 3.1: long waves stretched by the factor, short ones kept, those between blended."""
    length, low, high = (
        scaling[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    turns = length * theta / (2 * pi)  # L over wavelength
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return keep * theta + (1 - keep) * theta / scaling["factor"]


def magnitude(scaling: Config | None, key: str, default: float) -> float:
    """0.1 m ln s + 1, the square root of 1/t in the YaRN paper; 1 without YaRN."""
    if not scaling or scaling["type"] != "yarn":
        return 1.0
    return 0.1 * scaling.get(key, default) * log(scaling["factor"]) + 1


def rotated_length(config: Config) -> float:
    """The factor on cosine and sine."""
    scaling = config.get("rope_scaling")
    return magnitude(scaling, "mscale", 1.0) / magnitude(scaling, "mscale_all_dim", 0.0)


def softmax_scale(config: Config, width: int) -> float:
    """The factor on query times key: the whole logit gets YaRN's magnitude, once for the query, once for the key."""
    return width**-0.5 * magnitude(config.get("rope_scaling"), "mscale_all_dim", 0.0) ** 2


def interleaved(x: Array, theta: Array, length: float) -> Array:
    """Rotate the pairs (2i, 2i + 1) of x [T, heads, P] by position times theta_i, as complex numbers."""
    turn = length * np.exp(1j * np.outer(np.arange(len(x)), theta))[:, None]  # [T, 1, P/2]
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack((z.real, z.imag), -1).reshape(x.shape)


def half_split(x: Array, theta: Array, length: float) -> Array:
    """Rotate the pairs (i, i + D/2) of x [T, heads, D] by position times theta_i, as complex numbers."""
    turn = length * np.exp(1j * np.outer(np.arange(len(x)), theta))[:, None]  # [T, 1, D/2]
    z = (x[..., : len(theta)] + 1j * x[..., len(theta) :]) * turn
    return np.concatenate((z.real, z.imag), -1)


# Attention.


def attend(q: Array, k: Array, v: Array, scale: float) -> Array:
    """q, k [T, H, D], v [T, H, V] -> [T, H V]: o_t = sum over j <= t of softmax_j(scale q_t k_j) v_j."""
    out = np.empty((len(q), q.shape[1], v.shape[2]))
    for t in range(len(q)):
        weights = softmax(np.einsum("hd,jhd->hj", q[t], k[: t + 1]) * scale)
        out[t] = np.einsum("hj,jhv->hv", weights, v[: t + 1])
    return out.reshape(len(q), -1)


def latent_attention(w: Weights, x: Array, config: Config) -> Array:
    """MLA as defined (V3 Eq 1-11), nothing absorbed."""
    heads, nope, rope, rank, eps = (
        config[k]
        for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank", "rms_norm_eps")
    )
    if config.get("q_lora_rank"):
        q = linear(w, "q_b_proj", rms_norm(linear(w, "q_a_proj", x), w["q_a_layernorm.weight"], eps))
    else:
        q = linear(w, "q_proj", x)
    q = q.reshape(len(x), heads, nope + rope)
    latent = linear(w, "kv_a_proj_with_mqa", x)  # [T, R + P]
    c_kv = rms_norm(latent[:, :rank], w["kv_a_layernorm.weight"], eps)
    kv = linear(w, "kv_b_proj", c_kv).reshape(len(x), heads, nope + config["v_head_dim"])
    theta, length = frequencies(config, rope), rotated_length(config)
    q_r = interleaved(q[..., nope:], theta, length)
    k_r = interleaved(latent[:, None, rank:], theta, length).repeat(heads, 1)  # one rotary key for all heads
    q, k = np.concatenate((q[..., :nope], q_r), -1), np.concatenate((kv[..., :nope], k_r), -1)
    return linear(w, "o_proj", attend(q, k, kv[..., nope:], softmax_scale(config, nope + rope)))


def plain_attention(w: Weights, x: Array, config: Config) -> Array:
    """MHA, GQA and MQA: query head i reads key-value head i // (H / G)."""
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    q, k, v = (linear(w, f"{n}_proj", x).reshape(len(x), -1, width) for n in "qkv")
    theta = frequencies(config, width)
    q, k = half_split(q, theta, 1.0), half_split(k, theta, 1.0)
    k, v = (part.repeat(heads // groups, 1) for part in (k, v))
    return linear(w, "o_proj", attend(q, k, v, width**-0.5))


# Experts.


def route(w: Weights, x: Array, config: Config) -> tuple[Array, Array]:
    """(experts [K], weights [K]) of one token x [d]."""
    affinity = {"softmax": softmax, "sigmoid": sigmoid}[config.get("scoring_func") or "softmax"]
    method = config.get("topk_method") or "greedy"
    scores = affinity(w["weight"] @ x)  # s_i
    choice = scores + w["e_score_correction_bias"] if method == "noaux_tc" else scores
    if method != "greedy":
        choice = within_best_groups(choice, config, best=2 if method == "noaux_tc" else 1)
    experts = largest(choice, config["num_experts_per_tok"])
    weights = scores[experts]  # the bias only chooses (V3 Eq 16)
    if config["norm_topk_prob"]:
        weights = weights / weights.sum()
    return experts, weights * config.get("routed_scaling_factor", 1.0)


def within_best_groups(choice: Array, config: Config, best: int) -> Array:
    """Node-limited routing: a group is worth the sum of its `best` largest entries, and only topk_group groups stay."""
    groups = choice.reshape(config["n_group"], -1)
    worth = np.sort(groups, -1)[:, -best:].sum(-1)
    limited = np.full_like(groups, LOST)
    kept = largest(worth, config["topk_group"])
    limited[kept] = groups[kept]
    return limited.reshape(-1)


def largest(x: Array, count: int) -> Any:
    """The indices of the `count` largest entries."""
    return np.argsort(-x)[:count]


def mixture(w: Weights, x: Array, config: Config) -> Array:
    """V3 Eq 12: the shared experts as one wider network, and the chosen experts by their weights."""
    out = feed_forward(under("shared_experts", w), x)
    gate, expert = under("gate", w), [under(f"experts.{e}", w) for e in range(config["n_routed_experts"])]
    for t in range(len(x)):
        for e, weight in zip(*route(gate, x[t], config)):
            out[t] += weight * feed_forward(expert[e], x[t])
    return out


# Multi-token prediction.


def released_module(eh_proj: Array, hidden: Array, embedding: Array) -> Array:
    """eh_proj [d, 2d] as released: its first d columns read the normalised embedding, the others the hidden state."""
    return np.concatenate((embedding, hidden), -1) @ eh_proj.T


def paper_module(m_k: Array, hidden: Array, embedding: Array) -> Array:
    """M_k [RMSNorm(h); RMSNorm(Emb(t))], M_k [d, 2d], as printed (V3 Eq 21)."""
    return np.concatenate((hidden, embedding), -1) @ m_k.T


# The model.


class Reference:
    """A checkpoint folder of any family member, for one sequence at a time."""

    def __init__(self, folder: Path):
        self.config, self.weights = read_checkpoint(folder)
        self.layers: int = self.config["num_hidden_layers"]

    def norm(self, name: str, x: Array) -> Array:
        return rms_norm(x, self.weights[f"{name}.weight"], self.config["rms_norm_eps"])

    def block(self, n: int, x: Array) -> Array:
        """Transformer block n: x [T, d] -> [T, d]."""
        name = f"model.layers.{n}"
        w = under(name, self.weights)
        attention = latent_attention if self.config.get("kv_lora_rank") else plain_attention
        x = x + attention(under("self_attn", w), self.norm(f"{name}.input_layernorm", x), self.config)
        y, mlp = self.norm(f"{name}.post_attention_layernorm", x), under("mlp", w)
        dense = not self.config.get("n_routed_experts") or n < self.config["first_k_dense_replace"]
        return x + (feed_forward(mlp, y) if dense else mixture(mlp, y, self.config))

    def hidden(self, ids: list[int]) -> Array:
        """What the head reads, after the final norm: [T, d]."""
        x = self.weights["model.embed_tokens.weight"][ids]
        for n in range(self.layers):
            x = self.block(n, x)
        return self.norm("model.norm", x)

    def logits(self, ids: list[int]) -> Array:
        """[T, vocabulary]."""
        tied = self.config.get("tie_word_embeddings")
        return self.hidden(ids) @ self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T

    def mtp_logits(self, ids: list[int], module: Module) -> list[Array]:
        """One [T - k, vocabulary] per module k = 1..D: what follows t_{i+k} after h_i and t_{i+1..i+k} (V3 Eq 21-23).

        h^0 is the hidden state after the final norm, h^k that after the module's own last norm. `module` joins the
        two inputs: `released_module` as the checkpoint stores its matrix, `paper_module` as the paper prints it.
        """
        h, logits = self.hidden(ids), []
        for k in range(1, self.config.get("num_nextn_predict_layers", 0) + 1):
            n = self.layers + k - 1
            name = f"model.layers.{n}"
            w = under(name, self.weights)
            h = h[:-1]  # position i needs the token at i + k
            embedding = w["embed_tokens.weight"][ids[k:]]
            joined = module(w["eh_proj.weight"], self.norm(f"{name}.hnorm", h), self.norm(f"{name}.enorm", embedding))
            h = self.norm(f"{name}.shared_head.norm", self.block(n, joined))
            logits.append(h @ w["shared_head.head.weight"].T)
        return logits
